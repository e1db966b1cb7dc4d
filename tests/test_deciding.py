"""`wrap` alone: nothing if the step fits, else the cheapest of what there is; and it says what stands in the way."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import vdnn
from vdnn.checkpointing import checkpoint_blocks
from vdnn.deciding import machine_of
from vdnn.errors import EngineError
from vdnn.models import checkpointed
from vdnn.planner import best_plan
from vdnn.policies import Options


def steps(model: nn.Module, work, number: int = 2, device: Any = None) -> list[torch.Tensor]:
    args, kwargs = work.inputs("cpu")
    targets = work.targets("cpu")
    found: list[torch.Tensor] = []
    for step in range(number):
        torch.manual_seed(step)
        with device or contextlib.nullcontext():  # what does not fit into its memory fails
            loss = work.loss(model(*args, **kwargs), targets)
            loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        found += [buffer.clone() for buffer in model.buffers()]
        model.zero_grad(set_to_none=True)
    return found


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


WORK = vdnn.load("demo:transformer", batch=4)


class Sharing(nn.Module):
    """Blocks that call one norm of the network's: a plan runs no such block again, so checkpointing is all there is."""

    class Block(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = (norm,)  # called, and no part of the block
            self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.tanh(self.up(self.norm[0](x))))

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 8)
        self.blocks = nn.ModuleList([self.Block(self.norm) for _ in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass(frozen=True)
class Rows:
    """A step of `Sharing` on so many rows."""

    rows: int

    def build(self) -> nn.Module:
        return Sharing()

    def inputs(self, device: str) -> tuple[tuple[torch.Tensor], dict[str, Any]]:
        return (torch.linspace(-1, 1, 64 * self.rows, device=device).reshape(self.rows, 64),), {}

    def targets(self, device: str) -> torch.Tensor:
        return torch.arange(self.rows, device=device) % 8

    def loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output, targets)


@pytest.fixture(scope="module")
def peak() -> int:
    """Requested bytes of the plain step."""
    found = vdnn.simulate(vdnn.capture(WORK, device="cpu", optimizer="none")).peak_requested_bytes
    assert found is not None
    return found


@pytest.fixture(scope="module")
def sharing_peak() -> int:
    """The same of `Sharing` on 1024 rows."""
    found = vdnn.simulate(vdnn.capture(Sharing(), *Rows(1024).inputs("cpu")[0], device="cpu", optimizer="none"))
    assert found.peak_requested_bytes is not None
    return found.peak_requested_bytes


def wrapped(memory: int, link: str, caplog: pytest.LogCaptureFixture, work: Any = WORK) -> tuple[nn.Module, list[str]]:
    """The model after two steps that were compared with plain ones, and what the log said."""
    torch.manual_seed(0)
    model = work.build()
    plain = copy.deepcopy(model)
    device = vdnn.VirtualDevice(memory=memory, d2h=link, h2d=link, seed=5)
    with caplog.at_level(logging.INFO, "vdnn"):
        vdnn.wrap(model, device=device, optimizer="none", min_bytes=1024)
        expected = steps(plain, work)
        for tensor in (*model.parameters(), *model.buffers()):
            device.account.add(tensor)
        assert same(steps(model, work, device=device), expected)
    device.finish()
    return model, [record.getMessage() for record in caplog.records]


@pytest.mark.case(60)
def test_nothing_moves_where_the_step_fits(peak: int, caplog: pytest.LogCaptureFixture) -> None:
    model, said = wrapped(4 * peak, "12GB/s", caplog)
    assert vdnn.report(model).offloaded_bytes == 0
    assert len(said) == 1
    assert "nothing is offloaded; the step fits into" in said[0]


def test_a_fast_link_offloads(peak: int, caplog: pytest.LogCaptureFixture) -> None:
    model, said = wrapped(peak * 9 // 10, "900GB/s", caplog)
    assert vdnn.report(model).policy == "budget"
    assert vdnn.report(model).offloaded_bytes > 0
    assert "offload is active: " in said[0]


def test_a_slow_link_computes_again_instead_of_moving(peak: int, caplog: pytest.LogCaptureFixture) -> None:
    model, said = wrapped(peak * 11 // 20, "10MB/s", caplog)
    assert vdnn.report(model).policy == "budget"
    assert len(said) == 1
    assert re.search(r"nothing is offloaded; computes \d+ again, ", said[0])


def test_blocks_are_recomputed_where_that_moves_less(sharing_peak: int, caplog: pytest.LogCaptureFixture) -> None:
    model, said = wrapped(sharing_peak * 48 // 100, "10MB/s", caplog, Rows(1024))
    assert vdnn.report(model).policy == "checkpoint-offload"
    assert len(said) == 1
    assert "recomputes 6 blocks: deciding by storage would take " in said[0]
    vdnn.unwrap(model)
    assert not any("forward" in vars(block) for block in model.modules())


@pytest.mark.parametrize("part", [39, 41, 45])
def test_a_plan_of_all_actions_is_no_slower_than_checkpointing_the_blocks(peak: int, part: int) -> None:
    """Of 80 parts of the peak; where plans could not run blocks again, the first took 545 times the time."""
    machine = machine_of(vdnn.VirtualDevice(memory=peak, d2h="10MB/s", h2d="10MB/s"))
    times = []
    for work in (WORK, checkpointed(WORK)):
        trace = vdnn.capture(work, device="cpu", optimizer="none")
        found = best_plan(trace, machine, peak * part // 80, Options(min_bytes=1024))
        times.append(found.result.iteration_time_ns or 0)
    assert 0 < times[0] <= times[1]


def test_checkpoints_are_planned_storage_by_storage_where_no_plan_runs_blocks_again(sharing_peak: int) -> None:
    """They were taken for one more policy, whose own offloads take several times the time."""
    machine = machine_of(vdnn.VirtualDevice(memory=sharing_peak, d2h="10MB/s", h2d="10MB/s"))
    budget, options = sharing_peak * 48 // 100, Options(min_bytes=1024)
    inputs = Rows(1024).inputs("cpu")[0]
    model = Sharing()
    trace = vdnn.capture(model, *inputs, device="cpu", optimizer="none")
    checkpoint_blocks(model)
    checkpoints = vdnn.capture(model, *inputs, device="cpu", optimizer="none")
    found = best_plan(trace, machine, budget, options, blocks=checkpoints)
    assert found.trace is checkpoints
    alone = best_plan(checkpoints, machine, budget, options).result.iteration_time_ns
    assert found.result.iteration_time_ns == alone


@pytest.mark.case(60)
def test_each_shape_has_its_own_decision(sharing_peak: int) -> None:
    large, small = Rows(1024), Rows(256)
    torch.manual_seed(0)
    model = Sharing()
    plain = copy.deepcopy(model)
    memory = sharing_peak * 48 // 100
    vdnn.wrap(
        model,
        device=vdnn.VirtualDevice(memory=memory, d2h="10MB/s", h2d="10MB/s", seed=1),
        optimizer="none",
        min_bytes=1024,
    )
    policies = []
    for work in (large, small, large, small):
        assert same(steps(model, work, number=1), steps(plain, work, number=1))
        policies.append(vdnn.report(model).policy)
    assert policies == ["checkpoint-offload", "budget", "checkpoint-offload", "budget"]
    vdnn.unwrap(model)


class Hoarding(nn.Module):
    """Returns all its hidden states, as models with `output_hidden_states=True` do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        states = []
        for layer in self.layers:
            x = layer(x).sigmoid()
            states.append(x)
        return states


@pytest.mark.case(33)
def test_a_report_names_who_holds_the_tensors() -> None:
    model = vdnn.wrap(Hoarding(), policy="vdnn-all", device=vdnn.VirtualDevice(), min_bytes=1, keep_soon=False)
    torch.stack(model(torch.randn(256, 64))).sum().backward()
    text = str(vdnn.report(model))
    # four states of 256 × 64 floats
    assert "256.0 KiB of saved feature maps cannot leave, because others hold them until backward:" in text
    assert "layers.1#0/0 (64.0 KiB, held by output)" in text


class Wide(nn.Module):
    """Its peak is the logits: three tensors of them at once in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)))
        self.head = nn.Linear(16, 4096)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.head(self.body(x)), 1).square().mean()


@pytest.mark.case(53)
def test_a_report_says_that_the_peak_lies_elsewhere() -> None:
    model = vdnn.wrap(Wide(), policy="vdnn-all", device=vdnn.VirtualDevice(), min_bytes=1, keep_soon=False)
    model(torch.randn(64, 16)).backward()
    assert vdnn.report(model).offloaded_bytes > 0
    text = str(vdnn.report(model))
    assert "this offload lowers the peak " in text
    assert "it lies at " in text
    assert "filled by" in text


class InPlace(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(8, 8))
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x.sigmoid())
        if self.inside:
            x.add_(y)
        return x + y


def test_an_input_changed_in_place_is_refused() -> None:
    """Recomputed from the changed input, gradients would be silently wrong."""
    model = nn.Sequential(InPlace(False), InPlace(True))
    checkpoint_blocks(model)
    with pytest.raises(EngineError, match="changes its input in place"):
        model(torch.randn(2, 8, requires_grad=True))
    blocks = nn.Sequential(InPlace(False), InPlace(False))
    checkpoint_blocks(blocks)
    x = torch.randn(2, 8, requires_grad=True) * 1
    y = blocks(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_plan_that_was_given_is_told_of_too(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    plan = vdnn.plan(vdnn.capture(model, torch.randn(4, 8), device="cpu"), "rtx4090", "vdnn-all", min_bytes=1)
    with caplog.at_level(logging.INFO, "vdnn"):
        vdnn.wrap(model, plan=plan, device=vdnn.VirtualDevice())
    vdnn.unwrap(model)
    moved = sum(entry.action.action == "offload" for entry in plan.entries)
    assert moved > 0
    assert f"offload is active: {moved} of {len(plan.entries)} saved storages" in caplog.records[0].getMessage()
