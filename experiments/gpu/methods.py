"""The ways to train with less memory: ours, torch's own, and the peers' where their packages are there.

    with METHODS["torchtune"](setup) as around:      prepares the model, and undoes it
        setup.step(around)                           `around` is open during each forward

A package that is missing, or a model that it does not take, raises `NotHere` with the reason.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch.utils.checkpoint import checkpoint

import vdnn
from experiments.gpu.workloads import SMALL, Setup
from vdnn.checkpointing import blocks_of

__all__ = ["METHODS", "OURS", "Around", "NotHere", "engine_device", "moved"]

Around = Callable[[], AbstractContextManager[Any]]
Method = Callable[[Setup], AbstractContextManager[Around]]

OURS = ("vdnn-conv", "vdnn-all", "checkpoint", "checkpoint-offload")


def moved(setup: Setup) -> dict[str, int]:
    """What one pass of ours moved and dropped."""
    report = vdnn.report(setup.model)
    passes = max(report.passes, 1)
    return {
        "offloaded_bytes": report.offloaded_bytes // passes,
        "returned_bytes": report.returned_bytes // passes,
        "dropped_bytes": report.dropped_bytes // passes,
    }


class NotHere(Exception):
    """A method that cannot be run here; says why."""


def engine_device(setup: Setup) -> Any:
    return vdnn.CudaDevice() if setup.device.type == "cuda" else vdnn.VirtualDevice(seed=1)


@contextlib.contextmanager
def nothing(setup: Setup) -> Iterator[Around]:
    yield nullcontext


@contextlib.contextmanager
def _policy(setup: Setup, policy: str) -> Iterator[Around]:
    if policy.startswith("checkpoint") and not blocks_of(setup.model):
        raise NotHere("no repeated blocks in this model")
    # small networks have no large tensors: on a GPU, too, nothing of them would move
    options = {"min_bytes": 1024} if setup.workload in SMALL else {}
    vdnn.wrap(setup.model, policy=policy, device=engine_device(setup), optimizer="sgd", **options)
    try:
        yield nullcontext
    finally:
        vdnn.unwrap(setup.model)


@contextlib.contextmanager
def torch_checkpoint(setup: Setup) -> Iterator[Around]:
    """`torch.utils.checkpoint` around each repeated block, as one writes it by hand."""
    names = blocks_of(setup.model)
    if not names:
        raise NotHere("no repeated blocks in this model")
    blocks = [setup.model.get_submodule(name) for name in names]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    try:
        yield nullcontext
    finally:
        for block in blocks:
            del block.forward


@contextlib.contextmanager
def save_on_cpu(setup: Setup) -> Iterator[Around]:
    pinned = setup.device.type == "cuda"
    yield lambda: torch.autograd.graph.save_on_cpu(pin_memory=pinned)


@contextlib.contextmanager
def torchtune(setup: Setup) -> Iterator[Around]:
    with _missing("torchtune"):
        from torchtune.training import OffloadActivations
    # one object for the whole run, as its recipes have it
    with _refused("torchtune"):
        context = OffloadActivations()
    yield lambda: context


@contextlib.contextmanager
def trl(setup: Setup) -> Iterator[Around]:
    with _missing("trl"):
        from trl.models.activation_offloading import get_act_offloading_ctx_manager
    with _refused("trl"):
        context = get_act_offloading_ctx_manager(setup.model, warn_if_no_head=False)
    yield lambda: context


@contextlib.contextmanager
def deepspeed(setup: Setup) -> Iterator[Around]:
    """Hidden states of checkpointed Hugging Face blocks."""
    with _missing("deepspeed"):
        from deepspeed.runtime.activation_checkpointing.offload_activations import CheckpointHiddenStatesOffload
    model = setup.model
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise NotHere("it marks the blocks of Hugging Face models only")
    with _refused("deepspeed"):
        context = CheckpointHiddenStatesOffload()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield lambda: context
    finally:
        model.gradient_checkpointing_disable()


@contextlib.contextmanager
def _compiled(setup: Setup, **config: Any) -> Iterator[Around]:
    """`torch.compile` under settings of AOTAutograd; they must hold while the first step compiles."""
    if "CC" not in os.environ and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise NotHere("no C compiler here, and what torch.compile makes needs one")
    torch._dynamo.reset()
    plain = setup.model
    with torch._functorch.config.patch(**config):
        setup.model = torch.compile(plain)  # type: ignore[assignment]
        try:
            yield nullcontext
        finally:
            setup.model = plain
            torch._dynamo.reset()


def _mark_everything(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
    """AOTAutograd offloads the saved activations that a pass over the joint graph has marked: here, all of them."""
    for node in graph.graph.nodes:
        if node.op == "call_function":
            node.meta["should_offload"] = True
    return graph


@contextlib.contextmanager
def _missing(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # some raise more than ImportError where a part of theirs is missing
        raise NotHere(f"{name} cannot be imported: {type(error).__name__}: {str(error).strip()[:200]}") from error


@contextlib.contextmanager
def _refused(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise NotHere(f"{name} refuses: {type(error).__name__}: {str(error).strip()[:200]}") from error


METHODS: dict[str, Method] = {
    "no offload": nothing,
    **{name: partial(_policy, policy=name) for name in OURS},
    "save_on_cpu": save_on_cpu,
    "torch checkpoint": torch_checkpoint,
    "torchtune": torchtune,
    "trl": trl,
    "deepspeed": deepspeed,
    "compile": _compiled,
    "compile, memory budget 0.5": partial(_compiled, activation_memory_budget=0.5),
    "compile, AOT offload": partial(
        _compiled,
        enable_activation_offloading=True,
        activation_offload_separate_stream=True,
        joint_custom_pass=_mark_everything,
    ),
}
