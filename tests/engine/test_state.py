"""Modules that depend on more than their input, or are called more than once: what runs again gives the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import vdnn
from vdnn.engine import Rule, Schedule, VirtualDevice, wrap_model

WIDTH = 6


class Block(nn.Module):
    def __init__(self, first: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first or nn.Linear(WIDTH, WIDTH)
        self.norm = norm or nn.BatchNorm1d(WIDTH)
        self.act, self.second = nn.GELU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.act(self.norm(self.first(x))))


class MovingMean(nn.Module):
    """What it gives depends on the buffer that it changes."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.mean.mul_(0.5).add_(x.mean(0) * 0.5)
        return torch.tanh(x - self.mean)


class MovingNorm(nn.BatchNorm1d):
    """A batch norm of its own kind, which reads in training what it writes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.running_mean is not None
        with torch.no_grad():
            self.running_mean.mul_(0.5).add_(x.mean(0) * 0.5)
        return torch.tanh(x - self.running_mean)


class Growing(Block):
    """What it gives depends on how often it was called."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return super().forward(x) * self.calls


def twice() -> nn.Module:
    block = Block()
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), block, block, nn.Tanh(), block)


def of(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), make(), make(), nn.Linear(WIDTH, WIDTH))


# what is refused, in the words of the report
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "spectral norm": (of(lambda: Block(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)))), "the buffer _u"),
    "weight norm": (of(lambda: Block(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)))), ""),
    "moving mean": (of(lambda: Block(norm=MovingMean())), "the buffer mean of a MovingMean"),
    "a norm of its own": (of(lambda: Block(norm=MovingNorm(WIDTH))), "the buffer running_mean"),
    "counter": (of(Growing), ""),
    "one block three times": (twice, ""),
}


def trained(model: nn.Module) -> list[torch.Tensor]:
    found = []
    for number in range(3):
        torch.manual_seed(number)
        model.zero_grad()
        one, two = (model(torch.randn(5, WIDTH)).square().mean() for _ in range(2))
        (one + two).backward()
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [*found, *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("policy", ["recompute", "recompute-blocks"])
@pytest.mark.parametrize("name", MODELS)
def test_what_depends_on_more_than_its_input_trains_to_the_same_bits(name: str, policy: str) -> None:
    """A block with a spectral norm had other gradients: it ran again with vectors that its forward had moved on."""
    make, refused = MODELS[name]
    outcomes = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = make()
        if ours:
            vdnn.wrap(model, policy=policy, device=VirtualDevice(seed=1), min_bytes=1)
        outcomes.append(trained(model))
        if ours and policy == "recompute-blocks":
            said = vdnn.report(model).mismatches
            assert all(refused in text for text in said)
            assert bool(said) == bool(refused)
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_a_buffer_that_was_changed_since_raises() -> None:
    """A frozen norm whose statistics are set anew between forward and backward; eager raises, too."""
    torch.manual_seed(0)
    model = of(Block)().eval()
    vdnn.wrap(model, policy="recompute-blocks", device=VirtualDevice(), min_bytes=1)
    out = model(torch.randn(5, WIDTH)).sum()
    model.get_buffer("2.norm.running_mean").add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|was changed since forward"):
        out.backward()


@pytest.mark.parametrize("how", ["rule", "vdnn-all", "encode-offload", "recompute", "recompute-blocks"])
def test_noise_that_is_drawn_after_it_was_saved_is_not_copied_before(how: str) -> None:
    """The op of RReLU saves its noise, then draws it, and counts no change: a copy had what was there before."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.RReLU(), nn.Linear(WIDTH, WIDTH))
    x = torch.randn(5, WIDTH)
    schedule = Schedule(None, Rule(min_bytes=1, max_inflight_bytes=0, ahead_bytes=0))
    for seed in range(4):  # some do copies at once
        model = copy.deepcopy(plain)
        if how == "rule":
            wrap_model(model, VirtualDevice(seed=seed), lambda *_: schedule)
        else:
            vdnn.wrap(model, policy=how, device=VirtualDevice(seed=seed), min_bytes=1, keep_soon=False)
        for one in (plain, model):
            torch.manual_seed(1)
            one.zero_grad()
            one(x).square().sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("policy", ["recompute", "recompute-blocks", "checkpoint"])
def test_cached_parametrizations_are_computed_as_often_as_in_forward(policy: str, inside: bool) -> None:
    """The capture left fake weights in the cache; and a block that ran again with another cache saved other tensors."""
    outcomes = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = of(lambda: Block(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))))()
        if ours:
            vdnn.wrap(model, policy=policy, device=VirtualDevice(seed=1), min_bytes=1)
        found = []
        for _ in range(2):
            model.zero_grad()
            x = torch.randn(5, WIDTH)
            with parametrize.cached():
                loss = (model(x) + model(x)).square().mean()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        outcomes.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
