"""Train the same thing with and without offload, and compare every bit.

    case = Case("lstm", make)            make(kind) gives a Training: its models, and a step to repeat
    plain = baseline(case, "cpu")        without offload; "cpu" stands for the virtual device
    outcome = compare(case, plain)       once for each way of running the case: its options are those of `vdnn.wrap`

What is compared: what each step returns (outputs, losses), every gradient that is there after it, and at the end
every parameter and buffer. Of each tensor only a digest is kept, so that large models fit twice.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import vdnn
from vdnn.engine import CudaDevice, VirtualDevice

__all__ = ["Baseline", "Case", "Outcome", "Training", "baseline", "compare"]

STEPS = 3
# As much as can move: from 1 KiB on, and also what backward asks for soon.
EVERYTHING: dict[str, Any] = {"policy": "vdnn-all", "min_bytes": 1024, "keep_soon": False}

Digests = dict[str, bytes]


@dataclass(frozen=True)
class Training:
    """Models by name, and a step: forward, backward and optimizer; it returns what is to be compared.

    `wrapped` are the models that offload (default: all of them); `holds` says that the models keep tensors from one
    step to the next, so that host memory need not be empty between steps.
    """

    models: Mapping[str, nn.Module]
    step: Callable[[int], Sequence[Tensor]]
    wrapped: Sequence[nn.Module] = ()
    holds: bool = False


@dataclass(frozen=True)
class Case:
    """A name, and what makes the training on "cpu" or "cuda"; `options` are those of `vdnn.wrap`."""

    name: str
    make: Callable[[str], Training]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Baseline:
    """What the steps give without offload. `differs` names what two such runs do not have alike ("" if all is), so
    that there is nothing to compare with."""

    kind: str
    digests: Digests
    differs: str


@dataclass(frozen=True)
class Outcome:
    """`differs` names the first digest that is not the baseline's ("" if all are)."""

    compared: int
    offloaded_bytes: int
    differs: str


def baseline(case: Case, kind: str) -> Baseline:
    """Train without offload; on CUDA twice, where some kernels give other bits each time."""
    with _repeatable(kind):
        plain = _train(case, kind, None)[0]
        again = _train(case, kind, None)[0] if kind == "cuda" else plain
    return Baseline(kind, plain, _difference(again, plain))


def compare(case: Case, plain: Baseline) -> Outcome:
    """Train with offload."""
    device = CudaDevice() if plain.kind == "cuda" else VirtualDevice(seed=len(case.name))
    with _repeatable(plain.kind):
        ours, moved = _train(case, plain.kind, device)
    return Outcome(len(plain.digests), moved, _difference(ours, plain.digests))


def _train(case: Case, kind: str, device: CudaDevice | VirtualDevice | None) -> tuple[Digests, int]:
    """Digests, and the bytes that were offloaded."""
    torch.manual_seed(0)
    training = case.make(kind)
    wrapped = list(training.wrapped or training.models.values()) if device is not None else []
    for model in wrapped:
        vdnn.wrap(model, device=device, **(EVERYTHING | dict(case.options)))
    found: Digests = {}
    for number in range(STEPS):
        torch.manual_seed(1 + number)
        for at, tensor in enumerate(training.step(number)):
            found[f"step {number + 1}, result {at}"] = _digest(tensor)
            assert not tensor.is_floating_point() or math.isfinite(tensor.detach().double().sum().item()), case.name
        for name, parameter in _named(training, "named_parameters"):
            if parameter.grad is not None:
                found[f"step {number + 1}, gradient of {name}"] = _digest(parameter.grad)
        if device is not None and not training.holds:
            assert device.host_bytes()[0] == 0, "a step is over and host memory is still in use"
    for what in ("named_parameters", "named_buffers"):
        for name, tensor in _named(training, what):
            found[f"at the end, {name}"] = _digest(tensor)
    reports = [vdnn.report(model) for model in wrapped]
    for model in wrapped:
        vdnn.unwrap(model)
    if isinstance(device, VirtualDevice):
        device.finish()
    for report in reports:
        # a fake tensor's memory format may not be a real one's: what then is not as planned stays, and is listed
        assert not [text for text in report.mismatches if "computed again" not in text], report.mismatches
    del training, wrapped
    gc.collect()
    return found, sum(report.offloaded_bytes for report in reports)


def _named(training: Training, what: str) -> Iterator[tuple[str, Tensor]]:
    for name, model in training.models.items():
        for inner, tensor in getattr(model, what)():
            yield f"{name} {inner}", tensor


def _digest(tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(data.numpy(), digest_size=16).digest()


def _difference(ours: Digests, theirs: Digests) -> str:
    for name in sorted(ours.keys() ^ theirs.keys()):
        return f"{name} is in one run only"
    return next((name for name, digest in ours.items() if digest != theirs[name]), "")


@contextlib.contextmanager
def _repeatable(kind: str) -> Iterator[None]:
    """Deterministic kernels, where there are any."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if kind == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
