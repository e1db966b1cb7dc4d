"""Blocks that run again from an input that no saved tensor is: the engine holds it, and the memory is the predicted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import vdnn
from tests.engine.test_blocks import EVERYTHING, GPU, again, measured, same
from vdnn.analysis.blocks import repeated
from vdnn.engine import VirtualDevice
from vdnn.errors import PlanMismatchError
from vdnn.policies import decide
from vdnn.values import Recompute, dumps, loads


class Layer(nn.Module):
    """Saves the square of its input, never the input; `way` says how it is given it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.drop = nn.Linear(16, 32), nn.Linear(32, 16), nn.Dropout(0.2)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        y = torch.stack(x).sum(0) if isinstance(x, list) else x
        return y + self.drop(self.two(self.act(self.one(y + 1))))


class Stack(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.layers = nn.ModuleList([Layer() for _ in range(4)])
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        for layer in self.layers:
            given = y
            y = layer([y, y * 0.5]) if self.way == "list" else layer(x=y) if self.way == "keyword" else layer(y)
            if self.way == "changed":
                given.mul_(1.5)
        return y


def made(way: str) -> tuple[Stack, torch.Tensor]:
    torch.manual_seed(0)
    return Stack(way), torch.randn(256, 16)


def trained(model: nn.Module, x: torch.Tensor, steps: int = 2) -> list[torch.Tensor]:
    found = []
    for number in range(steps):
        torch.manual_seed(number)
        model.zero_grad()
        out = model(x)
        out.square().mean().backward()
        found += [out.detach().clone(), torch.rand(1), *(p.grad.clone() for p in model.parameters())]
    return found


@pytest.mark.parametrize("way", ["plain", "list", "keyword"])
def test_an_input_that_is_not_saved_is_held_until_its_block_has_run_again(way: str) -> None:
    model, x = made(way)
    expected = trained(model, x)
    trace = vdnn.capture(model, x, device="cpu")
    assert [block.source for block in repeated(trace)] == [-1] * 4
    plan = decide("recompute-blocks", trace, GPU, EVERYTHING)
    assert loads(dumps(plan), "plan") == plan
    assert {action.source for action in again(plan)} == {""}
    device = VirtualDevice(seed=3)
    vdnn.wrap(model, plan=plan, device=device)
    assert same(trained(model, x), expected)
    assert not vdnn.report(model).mismatches
    predicted = vdnn.simulate(trace, plan, hardware="rtx4090").peak_requested_bytes
    assert measured(model, x, device) == predicted
    assert predicted is not None
    assert predicted < (vdnn.simulate(trace, None, hardware="rtx4090").peak_requested_bytes or 0)


def test_a_held_input_that_is_changed_before_its_block_runs_again_is_an_error_as_in_eager() -> None:
    model, x = made("plain")
    plan = decide("recompute-blocks", vdnn.capture(model, x, device="cpu"), GPU, EVERYTHING)
    model.way = "changed"
    vdnn.wrap(model, plan=plan, device=VirtualDevice())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trained(model, x, 1)


def test_a_plan_that_names_a_source_where_there_is_none_is_refused() -> None:
    model, x = made("plain")
    trace = vdnn.capture(model, x, device="cpu")
    plan = decide("recompute-blocks", trace, GPU, EVERYTHING)
    source = str(plan.entries[0].saved[0])
    entries = tuple(
        replace(e, action=replace(e.action, source=source)) if isinstance(e.action, Recompute) else e
        for e in plan.entries
    )
    with pytest.raises(PlanMismatchError, match="does not start from"):
        vdnn.simulate(trace, replace(plan, entries=entries), hardware="rtx4090")
