"""Storages that are computed again: never from what was changed, never for another storage, never too early."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.engine.mutation.scenarios.base import expect, must_raise, scenario
from vdnn.values import Entry, Offload, Plan, Recompute, SavedName

_CHANGED = "modified by an inplace operation"


def _names(module: str, *indexes: int) -> tuple[SavedName, ...]:
    return tuple(SavedName(module, 0, i, "float32", 2, 256) for i in indexes)


# An ELU saves its input; its output is what the product behind it saves, and comes again from that input.
_INPUT, _OUTPUT = _names("act", 0), _names("", 1, 2)
_AGAIN = Entry(_OUTPUT, 256, Recompute("", ("act#0",), str(_INPUT[0])))


class _Net(nn.Module):
    """x · 2 → ELU → its square; `between` may do something to the ELU's input or output."""

    def __init__(self, act: nn.Module, between: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.act = act
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2  # a number is saved by nobody: the model's first pack is the square's
        z = self.between(y, self.act(y))
        spare = z + 0
        return (spare * spare).sum() + (z * z).sum()


def _plan(*entries: Entry) -> Plan:
    return Plan("by hand", "an ELU", 8, "cpu", "", None, entries, "keep", 1)


def _again(index: int) -> Entry:
    return Entry(_names("", index, index + 1), 256, _AGAIN.action)


def _run(
    engine: ModuleType | None,
    device: Any = None,
    between: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda y, z: z,
    act: nn.Module | None = None,
    entries: tuple[Entry, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(-1, 1, 64).reshape(8, 8).requires_grad_()
    model = _Net(act or nn.ELU(), between)
    if engine is not None:
        schedule = engine.Schedule(_plan(*(entries or (_again(2),))))
        engine.wrap_model(model, device or engine.VirtualDevice(), lambda *_: schedule)
    loss = model(x)
    if engine is not None:
        counts = engine.engine_of(model).offloader.counts
        expect(counts.packs >= 5, f"{counts.packs} packs")
        engine.unwrap_model(model)
    return loss, x


def _exact(engine: ModuleType, **how: Any) -> None:
    loss, x = _run(engine, **how)
    (got,) = torch.autograd.grad(loss, x)
    plain = {name: value for name, value in how.items() if name in ("between", "act")}
    loss, x = _run(None, **plain)
    (expected,) = torch.autograd.grad(loss, x)
    expect(torch.equal(got, expected), "wrong gradients")


@scenario
def a_storage_comes_again(engine: ModuleType) -> None:
    _exact(engine)


@scenario
def a_storage_comes_again_from_one_that_was_away(engine: ModuleType) -> None:
    moved = Entry(_INPUT, 256, Offload("end #0"))
    for seed in range(3):
        device = engine.VirtualDevice(seed=seed)
        _exact(engine, device=device, entries=(_again(2), moved))
        device.finish()


@scenario
def what_a_module_gave_is_changed_before_it_is_saved(engine: ModuleType) -> None:
    """By hand, in place: the module alone would not make it again. Nothing was saved yet, so eager allows it."""

    def change(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            z.add_(0.5)
        return z

    _exact(engine, between=change)


@scenario
def what_it_comes_from_is_changed_after(engine: ModuleType) -> None:
    def change(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y.add_(1)
        return z

    loss, x = _run(engine, between=change)
    with must_raise(RuntimeError, _CHANGED):
        torch.autograd.grad(loss, x)


@scenario
def something_else_is_saved_in_its_place(engine: ModuleType) -> None:
    """Of the same version, and where the plan expects what the module gave."""
    _exact(engine, between=lambda y, z: z * 3)


class _SavesAnother(nn.Module):
    """Saves something of its input's form that is not its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.elu(x * 3)


@scenario
def a_source_that_is_not_the_module_s_input(engine: ModuleType) -> None:
    _exact(engine, act=_SavesAnother())


class _Weighed(nn.Module):
    """Its output's product with a weight: the weight's gradient needs the output, and not what it was made from."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.act(x * 2) * self.weight).sum()


def _weighed(engine: ModuleType | None, act: nn.Module) -> tuple[_Weighed, torch.Tensor]:
    model = _Weighed(act)
    entry = Entry(_names("", 1), 256, _AGAIN.action)  # the weight is its first
    if engine is not None:
        engine.wrap_model(model, engine.VirtualDevice(), lambda *_: engine.Schedule(_plan(entry)))
    return model, model(torch.linspace(-1, 1, 64).reshape(8, 8).requires_grad_())


class _ChangesItsInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.elu(x)
        with torch.no_grad():
            x.add_(1)
        return y


@scenario
def a_source_that_the_module_changes(engine: ModuleType) -> None:
    """Whoever asks for the output alone gets it, as in eager."""
    found = []
    for ours in (engine, None):
        model, loss = _weighed(ours, _ChangesItsInput())
        found += torch.autograd.grad(loss, model.weight)
    expect(torch.equal(*found), "wrong gradients")


@scenario
def a_changed_weight_gives_no_wrong_numbers(engine: ModuleType) -> None:
    act = nn.PReLU()
    model, loss = _weighed(engine, act)
    with torch.no_grad():
        act.weight.add_(1)
    with must_raise(RuntimeError, "computed again"):
        torch.autograd.grad(loss, model.weight)


@scenario
def what_comes_again_is_nowhere_until_then(engine: ModuleType) -> None:
    seen: list[StorageWeakRef] = []

    def note(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        seen.append(StorageWeakRef(z.untyped_storage()))
        return z

    loss, x = _run(engine, between=note)
    expect(seen[0].expired(), "the storage still lives after forward")
    torch.autograd.grad(loss, x)


@scenario
def what_came_again_is_changed(engine: ModuleType) -> None:
    """A change of the restored bytes is seen the second time they are asked for, as eager sees it."""

    class Spoiling(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(z)
            return z.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            (z,) = ctx.saved_tensors
            z.add_(1)
            return grad

    names = SavedName("", 0, 0, "float32", 2, 256)
    entry = Entry((names,), 256, _AGAIN.action)
    loss, x = _run(engine, between=lambda y, z: Spoiling.apply(z), entries=(entry,))
    torch.autograd.grad(loss, x, retain_graph=True)
    with must_raise(RuntimeError, _CHANGED):
        torch.autograd.grad(loss, x)


@scenario
def a_weight_that_was_changed_since(engine: ModuleType) -> None:
    act = nn.PReLU()
    loss, x = _run(engine, act=act)
    with torch.no_grad():
        act.weight.add_(1)
    with must_raise(RuntimeError, _CHANGED):
        torch.autograd.grad(loss, x)


@scenario
def asked_for_on_another_stream(engine: ModuleType) -> None:
    device = engine.VirtualDevice()
    loss, x = _run(engine, device)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    other = engine.virtual.order.Stream("a second compute stream")
    with device.stream(other):
        (second,) = torch.autograd.grad(loss, x)
    device.finish()
    expect(torch.equal(first, second), "wrong gradients")


class _Shifts(nn.Module):
    """An ELU, and a buffer that its output depends on; in forward it may move the buffer first."""

    def __init__(self, moves: float) -> None:
        super().__init__()
        self.moves = moves
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shift: torch.Tensor
        if self.moves:
            self.shift.add_(self.moves)
        return nn.functional.elu(x) + self.shift


@scenario
def a_buffer_that_the_module_moves_and_reads(engine: ModuleType) -> None:
    """Run again it would read the buffer as it is then."""
    found = []
    for ours in (engine, None):
        loss, x = _run(ours, act=_Shifts(0.5))
        found += torch.autograd.grad(loss, x)
    expect(torch.equal(*found), "wrong gradients")


@scenario
def a_buffer_that_was_changed_since(engine: ModuleType) -> None:
    act = _Shifts(0)
    loss, x = _run(engine, act=act)
    act.shift.add_(1)
    with must_raise(RuntimeError, "was changed since forward"):
        torch.autograd.grad(loss, x)
