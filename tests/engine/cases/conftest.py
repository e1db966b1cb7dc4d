"""Where the cases run: on the virtual device, and on CUDA where there is one; by rule, and by plan."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vdnn
from vdnn.engine import CudaDevice, Offloader, Rule, Schedule, VirtualDevice, engine_of, offloading, wrap_model

# Everything that can move does, one after the other, and comes back a little ahead.
EAGER = Rule(min_bytes=1, max_inflight_bytes=1 << 12, ahead_bytes=1 << 14)

Step = Callable[[nn.Module, int], Sequence[Tensor]]


@dataclass
class Ground:
    """A device, and how storages are chosen: "rule" or "plan"."""

    kind: str
    how: str
    device: Any = None
    models: list[nn.Module] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = CudaDevice() if self.kind == "cuda" else VirtualDevice(seed=7)

    @property
    def virtual(self) -> bool:
        return isinstance(self.device, VirtualDevice)

    def wrap(self, model: nn.Module, rule: Rule = EAGER) -> nn.Module:
        if self.how == "plan":
            vdnn.wrap(model, "vdnn-all", device=self.device, min_bytes=1, keep_soon=False)
        else:
            wrap_model(model, self.device, lambda *_: Schedule(None, rule))
        self.models.append(model)
        return model

    def block(self, rule: Rule = EAGER) -> Any:
        """A `with` block whose saved tensors are offloaded by rule."""
        return offloading(self.device, rule)

    def offloader(self, model: nn.Module) -> Offloader:
        return engine_of(model).offloader

    def same(self, make: Callable[[], nn.Module], step: Step, steps: int = 2, moves: bool = True) -> nn.Module:
        """Run the step with and without offload, and compare every bit of results, gradients, parameters, buffers.

        Returns: the wrapped model.
        """
        torch.manual_seed(0)
        plain = make().to(self.kind)
        ours = self.wrap(copy.deepcopy(plain))
        for number in range(steps):
            found = []
            for model in (plain, ours):
                torch.manual_seed(10 + number)
                results = [tensor.detach().clone() for tensor in step(model, number)]
                results += [p.grad.clone() for p in model.parameters() if p.grad is not None]
                found.append((results, torch.get_rng_state()))
            assert equal(found[0][0], found[1][0]), f"step {number} differs"
            assert torch.equal(found[0][1], found[1][1]), "the random numbers are at another place"
        assert equal([*plain.parameters(), *plain.buffers()], [*ours.parameters(), *ours.buffers()])
        counts = self.offloader(ours).counts
        assert bool(counts.offloaded_storages) == moves
        assert not counts.mismatches
        return ours

    def nothing_left(self) -> None:
        """No byte of the device's host memory is in use."""
        gc.collect()
        if self.virtual:
            self.device.finish()
        assert self.device.host_bytes()[0] == 0


def equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether every bit is the same, those of NaNs too."""
    return len(left) == len(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
        for a, b in zip(left, right, strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return dense.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _grounds() -> list[Any]:
    return [
        pytest.param((kind, how), id=f"{name}-{how}", marks=[pytest.mark.gpu] if kind == "cuda" else [])
        for kind, name in (("cpu", "virtual"), ("cuda", "cuda"))
        for how in ("rule", "plan")
    ]


@pytest.fixture(params=_grounds())
def ground(request: pytest.FixtureRequest) -> Iterator[Ground]:
    """Both devices, by rule and by plan."""
    yield from _ground(*request.param)


@pytest.fixture(params=[p for p in _grounds() if p.values[0][1] == "rule"])
def ruled(request: pytest.FixtureRequest) -> Iterator[Ground]:
    """Both devices, by rule: for what no capture sees."""
    yield from _ground(*request.param)


def _ground(kind: str, how: str) -> Iterator[Ground]:
    before = torch.are_deterministic_algorithms_enabled()
    if kind == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    ground = Ground(kind, how)
    yield ground
    torch.use_deterministic_algorithms(before)
    for model in ground.models:
        vdnn.unwrap(model)
    ground.models.clear()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
