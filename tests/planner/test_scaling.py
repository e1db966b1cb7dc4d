"""A plan scales to another batch by name; what does not fit any more is planned anew, and each shape once."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch

import vdnn
from vdnn.analysis.synthetic import conv_chain, fork_join
from vdnn.errors import PlanMismatchError
from vdnn.planner import best_plan, scaled_plan
from vdnn.policies import Options
from vdnn.sim import simulate_step
from vdnn.values import hardware

MACHINE = hardware("rtx4090")
OPTIONS = Options(min_bytes=1)


def chain(batch: int):
    return conv_chain(batch=batch, channels=(16, 32) * 4, size=64)


def test_a_scaled_plan_takes_the_same_decisions_and_fits_the_scaled_budget() -> None:
    plan = best_plan(chain(128), MACHINE, 300 << 20, OPTIONS).plan
    other = chain(160)
    scaled = scaled_plan(plan, other)
    assert [type(e.action) for e in scaled.entries] == [type(e.action) for e in plan.entries]
    assert scaled.batch == 160
    assert scaled.trace == other.fingerprint()
    for mine, theirs in zip(scaled.entries, plan.entries, strict=True):
        if other.storages and theirs.storage_bytes > 1 << 20:
            assert mine.storage_bytes == pytest.approx(theirs.storage_bytes * 1.25, rel=0.01)
    simulate_step(other, scaled, MACHINE)  # is a plan of that step
    with pytest.raises(PlanMismatchError):
        simulate_step(other, plan, MACHINE)


def test_a_plan_does_not_scale_to_another_model_or_device() -> None:
    plan = best_plan(chain(128), MACHINE, 300 << 20, OPTIONS).plan
    with pytest.raises(PlanMismatchError, match="plan it anew"):
        scaled_plan(plan, fork_join(batch=128))
    with pytest.raises(PlanMismatchError, match="device"):
        scaled_plan(plan, replace(chain(128), device="cpu"))


@pytest.mark.parametrize(("batch", "scales"), [(7, True), (5, False), (10, False)])
def test_wrap_scales_its_plan_to_another_batch_or_makes_another(
    batch: int, scales: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The plan for 8 serves 7; for 5 it would move too much, and 10 does not fit with it."""
    work = vdnn.load("demo:cnn", batch=8)
    torch.manual_seed(0)
    model = work.build()
    plain = copy.deepcopy(model)
    peak = simulate_step(vdnn.capture(work, device="cpu", optimizer="none"), None, MACHINE).peak_requested_bytes
    assert peak is not None
    vdnn.wrap(model, budget=peak * 7 // 10, device=vdnn.VirtualDevice(), optimizer="none", min_bytes=1)
    with caplog.at_level(logging.INFO, "vdnn"):
        for size in (8, batch, 8, batch):
            args, kwargs = vdnn.load("demo:cnn", batch=size).inputs("cpu")
            torch.manual_seed(1)
            left = model(*args, **kwargs)
            torch.manual_seed(1)
            right = plain(*args, **kwargs)
            assert torch.equal(left, right)
            left.sum().backward()
            right.sum().backward()
            for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                assert torch.equal(mine.grad, theirs.grad)
            model.zero_grad(set_to_none=True)
            plain.zero_grad(set_to_none=True)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2  # each shape is decided once
    assert ("scaled to batch" in said[1]) is scales
