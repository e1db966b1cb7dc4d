"""Blocks that run again: never from what was changed, never from something else than their input."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from tests.engine.mutation.scenarios.base import expect, must_raise, scenario
from vdnn.values import Entry, Plan, Recompute, SavedName

_CHANGED = "modified by an inplace operation"
_Inside = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Block(nn.Module):
    """An ELU of something, and its square; `inside` says of what, with the other tensor that the block takes."""

    def __init__(self, inside: _Inside) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        y = nn.functional.elu(self.inside(x, other)) * other.detach()
        return y * y


class _Net(nn.Module):
    def __init__(self, inside: _Inside, after: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self.block = _Block(inside)
        self.after = after

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        y = x * 2
        z = self.block(y, other)
        with torch.no_grad():
            self.after(y, other)
        return z.sum()


def _plan() -> Plan:
    # packs of the block: the ELU's input, the product's other factor, the square's two
    names = [SavedName("block", 0, n, "float32", 1, 64) for n in range(4)]
    entry = Entry(tuple(names[2:]), 64, Recompute("", (), str(names[0]), "block#0"))
    return Plan("by hand", "a block", 1, "cpu", "", None, (entry,))


def _run(
    engine: ModuleType | None,
    inside: _Inside = lambda x, other: x,
    after: Callable[[torch.Tensor, torch.Tensor], None] = lambda y, other: None,
    device: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(-1, 1, 16).requires_grad_()
    model = _Net(inside, after)
    if engine is not None:
        engine.wrap_model(model, device or engine.VirtualDevice(), lambda *_: engine.Schedule(_plan()))
    loss = model(x, torch.arange(16.0))
    if engine is not None:
        expect(engine.engine_of(model).offloader.counts.dropped_storages == 1, "nothing was dropped")
        engine.unwrap_model(model)
    return loss, x


def _exact(engine: ModuleType, inside: _Inside) -> None:
    found = []
    for ours in (engine, None):
        loss, x = _run(ours, inside)
        found += torch.autograd.grad(loss, x)
    expect(torch.equal(*found), "wrong gradients")


@scenario
def a_block_runs_again(engine: ModuleType) -> None:
    _exact(engine, lambda x, other: x)


@scenario
def a_block_changes_its_input_first(engine: ModuleType) -> None:
    """By hand, in place: run again from the changed one, it would change it twice."""

    def change(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x.mul_(1.5)
        return x

    _exact(engine, change)


@scenario
def a_block_that_saves_something_else_than_its_input(engine: ModuleType) -> None:
    _exact(engine, lambda x, other: x * 3)


@scenario
def a_block_s_input_is_changed_after(engine: ModuleType) -> None:
    def change(y: torch.Tensor, other: torch.Tensor) -> None:
        y.add_(1)

    loss, x = _run(engine, after=change)
    with must_raise(RuntimeError, _CHANGED):
        torch.autograd.grad(loss, x)


class _Other(nn.Module):
    """A block whose second tensor autograd does not save: only the block's second run reads it again."""

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        y = nn.functional.elu(x) + other
        return y * y


def _of(block: nn.Module, engine: ModuleType | None, other: Any = None) -> tuple[_Net, torch.Tensor, torch.Tensor]:
    """The network with a block like `_Other`, its loss and its input."""
    x, other = torch.linspace(-1, 1, 16).requires_grad_(), torch.arange(16.0) if other is None else other
    model = _Net(lambda x, other: x, lambda y, other: None)
    model.block = block  # type: ignore[assignment]
    if engine is not None:
        names = [SavedName("block", 0, n, "float32", 1, 64) for n in range(3)]
        entry = Entry(tuple(names[1:]), 64, Recompute("", (), str(names[0]), "block#0"))
        plan = Plan("by hand", "a block", 1, "cpu", "", None, (entry,))
        engine.wrap_model(model, engine.VirtualDevice(), lambda *_: engine.Schedule(plan))
    loss = model(x, other)
    if engine is not None:
        engine.unwrap_model(model)
    return model, loss, x


@scenario
def another_tensor_that_a_block_takes_is_changed_after(engine: ModuleType) -> None:
    other = torch.arange(16.0)
    _, loss, x = _of(_Other(), engine, other)
    other.add_(1)
    with must_raise(RuntimeError, "that a block takes"):
        torch.autograd.grad(loss, x)


@scenario
def another_tensor_that_a_block_takes_is_frozen_after(engine: ModuleType) -> None:
    other = torch.arange(16.0).requires_grad_()
    _, loss, x = _of(_Other(), engine, other)
    other.requires_grad_(False)
    torch.autograd.grad(loss, x)
    expect(not other.requires_grad, "what was frozen is trained again")


class _Twice(nn.Module):
    """A block that saves a tensor, for something that nobody wants, changes it, and saves it again."""

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        y = nn.functional.elu(x) + other
        self.unwanted = y.square()
        y += 1
        return y.square()


@scenario
def a_block_saves_a_tensor_at_two_versions(engine: ModuleType) -> None:
    found = []
    for ours in (engine, None):
        _, loss, x = _of(_Twice(), ours)
        found += torch.autograd.grad(loss, x)
    expect(torch.equal(*found), "wrong gradients")


class _Filling(nn.Module):
    """A block that puts another tensor, of the same form, into the list that it is given."""

    def forward(self, x: torch.Tensor, given: list[torch.Tensor]) -> torch.Tensor:
        y = nn.functional.elu(x) + given[0]
        given[0] = given[0] + 1
        return y * y


@scenario
def a_block_fills_a_list_that_it_is_given(engine: ModuleType) -> None:
    found = []
    for ours in (engine, None):
        other = torch.arange(16.0)
        _, loss, x = _of(_Filling(), ours, [other])
        found += torch.autograd.grad(loss, x)
        del other
    expect(torch.equal(*found), "wrong gradients")


class _Stateful(nn.Module):
    """A block that adds a tensor of its own, which is no buffer, and may change it in place."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.changes, self.state = changes, torch.arange(16.0)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        y = nn.functional.elu(x) + self.state
        if self.changes:
            self.state.add_(1)
        return y * y


@scenario
def a_block_changes_a_tensor_of_its_own(engine: ModuleType) -> None:
    found = []
    for ours in (engine, None):
        _, loss, x = _of(_Stateful(True), ours)
        found += torch.autograd.grad(loss, x)
    expect(torch.equal(*found), "wrong gradients")


@scenario
def a_tensor_of_a_block_is_changed_after(engine: ModuleType) -> None:
    model, loss, x = _of(_Stateful(False), engine)
    model.block.state.add_(1)  # type: ignore[operator, union-attr]
    with must_raise(RuntimeError, "the tensor state"):
        torch.autograd.grad(loss, x)


@scenario
def a_block_runs_again_on_another_stream(engine: ModuleType) -> None:
    device = engine.VirtualDevice()
    loss, x = _run(engine, device=device)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    other = engine.virtual.order.Stream("a second compute stream")
    with device.stream(other):
        (second,) = torch.autograd.grad(loss, x)
    device.finish()
    expect(torch.equal(first, second), "wrong gradients")
