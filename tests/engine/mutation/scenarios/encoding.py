"""Codes that stand for storages: never for another one, never read too early, never given to whom they are not for."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.engine.mutation.scenarios.base import expect, must_raise, scenario
from vdnn.errors import EngineError
from vdnn.values import Encode, Entry, Plan, SavedName

_N = 64


class _Twice(nn.Module):
    """Fills what a mask says, twice; `between` may do something to the mask."""

    def __init__(self, between: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.between = between

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = x.masked_fill(mask, 0)
        self.between(mask)
        return first, (x * 3).masked_fill(mask, 0)


def _plan(how: Any, *names: SavedName, release: str = "") -> Plan:
    return Plan("by hand", "codes", 1, "cpu", "", None, (Entry(names, names[0].nbytes, Encode(how, "", release)),))


def _masks(release: str = "") -> Plan:
    return _plan("bits", *(SavedName("", 0, n, "bool", 1, _N) for n in (0, 1)), release=release)


def _filled(
    engine: ModuleType | None, between: Callable[[torch.Tensor], None] = lambda mask: None, device: Any = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.linspace(-1, 1, _N).requires_grad_()
    model = _Twice(between)
    if engine is not None:
        engine.wrap_model(model, device or engine.VirtualDevice(), lambda *_: engine.Schedule(_masks()))
    first, second = model(x, (torch.arange(_N) % 3 == 0))
    if engine is not None:
        engine.unwrap_model(model)
    return x, first, second


def _second_is_exact(engine: ModuleType, between: Callable[[torch.Tensor], None]) -> None:
    found = []
    for ours in (engine, None):
        x, _, second = _filled(ours, between)
        found += torch.autograd.grad(second.sum(), x)
    expect(torch.equal(*found), "wrong gradients")


@scenario
def a_mask_stands_for_both_that_save_it(engine: ModuleType) -> None:
    device = engine.VirtualDevice()
    x, first, second = _filled(engine, device=device)
    (got,) = torch.autograd.grad((first + second).sum(), x)
    x, first, second = _filled(None)
    (expected,) = torch.autograd.grad((first + second).sum(), x)
    expect(torch.equal(got, expected), "wrong gradients")


@scenario
def a_mask_that_is_changed_before_it_is_saved_again(engine: ModuleType) -> None:
    """Whoever asks for the second alone gets the changed one."""

    def change(mask: torch.Tensor) -> None:
        mask.logical_not_()

    _second_is_exact(engine, change)


@scenario
def a_mask_that_is_another_one_by_then(engine: ModuleType) -> None:
    """Of the same version counter: its data was set."""

    def set_data(mask: torch.Tensor) -> None:
        mask.data = ~mask

    _second_is_exact(engine, set_data)


@scenario
def a_code_is_asked_for_on_another_stream(engine: ModuleType) -> None:
    device = engine.VirtualDevice()
    x, first, _ = _filled(engine, device=device)
    other = engine.virtual.order.Stream("a second compute stream")
    with device.stream(other):
        (got,) = torch.autograd.grad(first.sum(), x)
    device.finish()
    expect(torch.equal(got, (torch.arange(_N) % 3 != 0).float()), "wrong gradients")


@scenario
def what_a_code_stands_for_is_nowhere_until_then(engine: ModuleType) -> None:
    seen: list[StorageWeakRef] = []
    _filled(engine, lambda mask: seen.append(StorageWeakRef(mask.untyped_storage())))
    expect(seen[0].expired(), "the storage still lives after forward")


@scenario
def a_code_is_not_enough_for_the_node_that_asks(engine: ModuleType) -> None:
    model = nn.Sequential(nn.Sigmoid())
    plan = _plan("sign", SavedName("0", 0, 0, "float32", 1, 4 * _N))
    engine.wrap_model(model, engine.VirtualDevice(), lambda *_: engine.Schedule(plan))
    loss = model(torch.linspace(-1, 1, _N).requires_grad_()).sum()
    engine.unwrap_model(model)
    with must_raise(EngineError, "SigmoidBackward0 asks for"):
        loss.backward()
