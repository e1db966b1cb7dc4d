"""Blocks that run again from an input that no saved tensor is: the engine holds it, and the memory is the predicted."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

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


class Odd(nn.Module):
    """Blocks that are given, or keep, more than one tensor, and change it: each in a way of its own."""

    class Block(Layer):
        def __init__(self, way: str) -> None:
            super().__init__()
            self.way, self.scale, self.seen = way, torch.ones(16), [torch.ones(16)]
            self.losses: list[torch.Tensor] = []

        def forward(self, x: Any) -> Any:
            if self.way == "a dict is given another tensor":
                x["x"] = super().forward(x["x"])
                return x
            if self.way == "a list is given another tensor":
                x[0] = super().forward(x[0])
                return x[0]
            if self.way == "python's random numbers":
                return super().forward(x * random.random())
            y = super().forward(x * self.scale * self.seen[0])
            if self.way == "a state of its own":
                self.scale = y.detach().mean(0)
            if self.way == "a state in a list":
                self.seen[0] = y.detach().mean(0)
            if self.way == "losses in a list":
                self.losses.append(y.square().mean())
            return y

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.stem = way, nn.Linear(16, 16)
        self.blocks = nn.ModuleList([self.Block(way) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        for number in range(2):
            for block in self.blocks:
                if self.way == "a mask from outside":
                    block.scale = torch.full((16,), number + 0.5)
                if self.way == "a dict is given another tensor":
                    y = block({"x": y})["x"]
                else:
                    y = block([y] if self.way == "a list is given another tensor" else y)
        losses = [loss for block in self.blocks for loss in block.losses]
        for block in self.blocks:
            block.losses.clear()
        return y + torch.stack(losses).sum() if losses else y


@pytest.mark.parametrize(
    "way",
    [
        "a dict is given another tensor",
        "a list is given another tensor",
        "python's random numbers",
        "a state of its own",
        "a state in a list",
        "losses in a list",
        "a mask from outside",
    ],
)
def test_a_block_runs_again_with_what_it_was_given_and_had(way: str) -> None:
    outcomes = []
    for ours in (False, True):
        torch.manual_seed(0)
        model, x = Odd(way), torch.randn(32, 16)
        if ours:
            torch.manual_seed(0)
            plan = decide("recompute-blocks", vdnn.capture(Odd(way), x, device="cpu"), GPU, EVERYTHING)
            assert len(again(plan)) >= 8
            vdnn.wrap(model, plan=plan, device=VirtualDevice(seed=3))
        random.seed(0)
        outcomes.append(trained(model, x, 3))
        outcomes[-1].append(torch.tensor(random.random()))
        if ours:
            given = [text for text in vdnn.report(model).mismatches if "changes its input" in text]
            assert bool(given) == ("is given" in way)
    assert same(*outcomes)


def test_a_tensor_of_a_block_that_was_changed_in_place_since_is_an_error() -> None:
    torch.manual_seed(0)
    model, x = Odd("plain"), torch.randn(32, 16)
    plan = decide("recompute-blocks", vdnn.capture(model, x, device="cpu"), GPU, EVERYTHING)
    vdnn.wrap(model, plan=plan, device=VirtualDevice())
    loss = model(x).sum()
    model.blocks[1].seen[0].add_(1)
    with pytest.raises(RuntimeError, match=r"tensor seen .* is at version 1"):
        loss.backward()
