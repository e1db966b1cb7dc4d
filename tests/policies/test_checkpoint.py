"""Recomputation as a policy: in the trace, simulated, and executed; with the blocks' inputs offloaded, or not."""

from __future__ import annotations

import copy

import pytest
import torch

import vdnn
from vdnn.errors import UsageError
from vdnn.policies.checkpoint import recomputed_blocks

GPT = ("hf:gpt2", {"layers": 3, "hidden": 64, "sequence": 64, "vocabulary": 101})
RESNET = ("torchvision:resnet18", {"image_size": 64})
FORMER = ("demo:transformer", {})


def test_the_recomputed_blocks_are_seen_in_the_trace() -> None:
    name, options = GPT
    trace = vdnn.capture(vdnn.load(name, batch=2, checkpoint="blocks", **options))
    assert {trace.modules[c].fqn for c in recomputed_blocks(trace)} == {f"transformer.h.{i}" for i in range(3)}
    plain = vdnn.capture(vdnn.load(name, batch=2, **options))
    assert recomputed_blocks(plain) == set()
    flops = [sum(op.flops for op in t.ops if op.phase == "forward") for t in (plain, trace)]
    again = [sum(op.flops for op in t.ops if op.phase == "backward") for t in (plain, trace)]
    blocks = sum(
        op.flops
        for op in plain.ops
        if op.phase == "forward" and op.module >= 0 and plain.modules[op.module].fqn.startswith("transformer.h.")
    )
    assert flops[0] == flops[1]
    # early stop: the last op of a block is not needed, its product is not computed again
    assert 0.5 * blocks < again[1] - again[0] <= blocks


@pytest.mark.parametrize("policy", ["checkpoint", "checkpoint-offload"])
@pytest.mark.parametrize("case", [GPT, RESNET, FORMER], ids=lambda case: case[0])
def test_a_run_is_exact_and_its_peak_predicted_to_the_byte(case: tuple[str, dict[str, object]], policy: str) -> None:
    name, options = case
    done = vdnn.run(
        vdnn.load(name, batch=4, **options), policy, steps=2, optimizer="sgd", device="virtual", min_bytes=1
    )
    assert done.exact, done.differs
    assert done.measured.policy == policy
    assert done.measured.peak_requested_bytes == done.predicted.peak_requested_bytes
    assert done.measured.offloaded_bytes == done.predicted.offloaded_bytes
    assert (done.measured.offloaded_bytes > 0) == (policy == "checkpoint-offload")
    assert done.measured.peak_requested_bytes <= done.baseline.peak_requested_bytes


def test_recomputing_costs_time_and_saves_memory() -> None:
    work = vdnn.load("demo:transformer", batch=16, layers=8)
    again = vdnn.load("demo:transformer", batch=16, layers=8, checkpoint="blocks")
    plain, trace = vdnn.capture(work), vdnn.capture(again)
    kept, recomputed = vdnn.simulate(plain), vdnn.simulate(trace, vdnn.plan(trace, policy="checkpoint"))
    assert recomputed.iteration_time_ns > kept.iteration_time_ns
    assert recomputed.peak_requested_bytes < kept.peak_requested_bytes
    moved = vdnn.plan(trace, policy="checkpoint-offload", min_bytes=1, keep_soon=False)
    assert vdnn.simulate(trace, moved).peak_requested_bytes < recomputed.peak_requested_bytes
    blocks = {f"blocks.{i}" for i in range(8)}
    assert {e.saved[0].module for e in moved.entries if e.action.action == "offload"} <= blocks | {"embed", "drop"}


def test_a_trace_without_recomputation_and_a_model_without_blocks_are_refused() -> None:
    trace = vdnn.capture(vdnn.load("demo:transformer", batch=2))
    with pytest.raises(UsageError, match="option checkpoint=blocks"):
        vdnn.plan(trace, policy="checkpoint")
    with pytest.raises(UsageError, match="has no repeated blocks"):
        vdnn.capture(vdnn.load("torchvision:vgg11", batch=2, checkpoint="blocks"))
    with pytest.raises(UsageError, match="write checkpoint=blocks"):
        vdnn.load("torchvision:vgg11", batch=2, checkpoint=" , ")
    with pytest.raises(UsageError, match="is named like 'layer"):
        vdnn.load("demo:transformer", batch=2, checkpoint="layer.*").build()


def step(model, work) -> list[torch.Tensor]:
    torch.manual_seed(3)
    args, kwargs = work.inputs("cpu")
    loss = work.loss(model(*args, **kwargs), work.targets("cpu"))
    loss.backward()
    found = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("blocks", [(), ("blocks.1", "blocks.3")])
def test_wrap_recomputes_and_unwrap_undoes_it(blocks: tuple[str, ...]) -> None:
    work = vdnn.load("demo:transformer", batch=4)
    torch.manual_seed(0)
    model = work.build()
    expected = step(copy.deepcopy(model), work)
    vdnn.wrap(model, "checkpoint-offload", device=vdnn.VirtualDevice(), min_bytes=1, blocks=blocks)
    got = step(model, work)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    report = vdnn.report(model)
    assert report.offloaded_storages > 0
    assert report.mismatches == ()
    assert f"recomputes {len(blocks) or 4} blocks" in report.notes
    vdnn.unwrap(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    with pytest.raises(UsageError, match="has no repeated blocks"):
        vdnn.wrap(torch.nn.Linear(2, 2), "checkpoint", device=vdnn.VirtualDevice())
