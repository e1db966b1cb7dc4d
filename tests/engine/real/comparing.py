"""Train the same thing with and without offload, and compare every bit.

    case = Case("lstm", make)                   make(kind) gives a Training: its models, and a step to repeat
    outcome = compare(case, "cpu", STEPS)       "cpu" stands for the virtual device

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

__all__ = ["STEPS", "Case", "Outcome", "Training", "compare"]

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
class Outcome:
    """`differs` names the first digest that is not the same ("" if all are); `repeats` is False where two runs
    without offload differ already, so that there is nothing to compare with. `by_rule` says that some model could
    not be captured."""

    name: str
    parameters: int
    compared: int
    offloaded_bytes: int
    by_rule: bool
    differs: str
    repeats: bool = True

    @property
    def exact(self) -> bool:
        return self.repeats and not self.differs


def compare(case: Case, kind: str = "cpu", steps: int = STEPS) -> Outcome:
    """Train without and with offload. On CUDA without offload twice: some kernels give other bits each time."""
    with _repeatable(kind):
        plain, _, _, parameters = _train(case, kind, steps, None)
        if kind == "cuda":
            again = _train(case, kind, steps, None)[0]
            if again != plain:
                return Outcome(case.name, parameters, len(plain), 0, False, _difference(again, plain), repeats=False)
        device = CudaDevice() if kind == "cuda" else VirtualDevice(seed=len(case.name))
        ours, moved, by_rule, _ = _train(case, kind, steps, device)
    return Outcome(case.name, parameters, len(plain), moved, by_rule, _difference(ours, plain))


def _train(
    case: Case, kind: str, steps: int, device: CudaDevice | VirtualDevice | None
) -> tuple[Digests, int, bool, int]:
    torch.manual_seed(0)
    training = case.make(kind)
    wrapped = list(training.wrapped or training.models.values()) if device is not None else []
    for model in wrapped:
        vdnn.wrap(model, device=device, **(EVERYTHING | dict(case.options)))
    found: Digests = {}
    for number in range(steps):
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
    parameters = sum(p.numel() for _, p in _named(training, "named_parameters"))
    for report in reports:
        # a fake tensor's memory format may not be a real one's: what then is not as planned stays, and is listed
        assert not [text for text in report.mismatches if "computed again" not in text], report.mismatches
    moved, by_rule = sum(r.offloaded_bytes for r in reports), any(r.policy == "by rule" for r in reports)
    del training, wrapped
    gc.collect()
    return found, moved, by_rule, parameters


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
