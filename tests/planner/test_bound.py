"""The linear program's bound is below everything that can be done: every valid plan, and the best of all there are."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import hardwares, plans_for, traces
from vdnn.analysis.chains import action_of, chains
from vdnn.analysis.liveness import least_peak, requested
from vdnn.analysis.moments import Points
from vdnn.analysis.synthetic import conv_chain, fork_join, transformer_chain
from vdnn.costs import times_with
from vdnn.planner import best_plan, least_memory, time_bound
from vdnn.policies import Options, decide
from vdnn.policies.candidates import survey
from vdnn.policies.plans import make_plan
from vdnn.sim import simulate_step
from vdnn.values import Hardware, Offload, Plan, Recompute, Trace, hardware

MACHINE = hardware("rtx4090")
# A step of a few kilobytes takes microseconds: without launches and latencies the link is what counts.
BARE = replace(MACHINE, launch_ns=0, kernel_ns=0, link_latency_ns=0)


def bound(trace: Trace, machine: Hardware, budget: int) -> int:
    return time_bound(trace, machine, times_with(trace, machine, {}, ""), budget).time_ns


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_plan_is_faster_than_the_bound_at_its_own_peak(data: st.DataObject) -> None:
    trace = data.draw(traces())
    machine = data.draw(hardwares())
    plan = replace(data.draw(plans_for(trace)), default="keep")
    result = simulate_step(trace, plan, machine)
    assert result.peak_requested_bytes is not None
    assert result.iteration_time_ns is not None
    assert bound(trace, machine, max(result.peak_requested_bytes, 1)) <= result.iteration_time_ns
    assert least_memory(trace) <= result.peak_requested_bytes


@pytest.mark.parametrize("machine", [MACHINE, BARE, hardware("gh200")], ids=["rtx4090", "bare", "gh200"])
@pytest.mark.parametrize(
    "policy", ["vdnn-all", "vdnn-conv", "vdnn-dyn", "recompute", "recompute-offload", "chen-sqrt-n"]
)
@pytest.mark.parametrize(
    "trace",
    [conv_chain(batch=256, channels=(16, 32) * 4), fork_join(batch=256), transformer_chain(blocks=6, batch=32)],
    ids=["conv", "fork", "transformer"],
)
def test_no_policy_beats_the_bound(trace: Trace, policy: str, machine: Hardware) -> None:
    result = simulate_step(trace, decide(policy, trace, machine, Options(min_bytes=1)), machine)
    assert result.peak_requested_bytes is not None
    assert result.iteration_time_ns is not None
    assert bound(trace, machine, result.peak_requested_bytes) <= result.iteration_time_ns


# -- brute force ---------------------------------------------------------------------------------


def everything(trace: Trace) -> list[Plan]:
    """Every plan that keeps, offloads (with or without a prefetch) or computes again each of the movable storages."""
    points = Points(trace)
    again = chains(trace, costly=True)
    options = Options(min_bytes=1)
    choices: list[list[tuple[int, Offload | Recompute | None]]] = []
    for item in survey(trace, options):
        if item.movable:
            last = f"pack {points.names[item.tensors[-1]]}"
            later = [t for t in range(item.tensors[-1] + 1, len(trace.saved)) if trace.saved[t].module >= 0]
            found: list[tuple[int, Offload | Recompute | None]] = [(item.storage, None)]
            found.append((item.storage, Offload(last, f"unpack {points.names[later[0]]}" if later else "")))
            if item.storage in again:
                found.append((item.storage, action_of(points, again[item.storage])))
            choices.append(found)
    return [
        make_plan("all", trace, options, {s: action for s, action in chosen if action is not None}, {})
        for chosen in product(*choices)
    ]


@pytest.mark.parametrize("machine", [BARE, replace(BARE, d2h_bytes_per_s=10**9, h2d_bytes_per_s=10**9)])
@pytest.mark.parametrize(
    "trace",
    [
        conv_chain(batch=64, channels=(8, 8), pool_every=0),
        conv_chain(batch=64, channels=(16, 4), pool_every=1, size=16),
        fork_join(batch=16, size=16),
    ],
    ids=["two", "pools", "fork"],
)
def test_the_best_of_all_plans_is_no_faster_than_the_bound_and_the_planner_finds_it(
    trace: Trace, machine: Hardware
) -> None:
    assert len([item for item in survey(trace, Options(min_bytes=1)) if item.movable]) <= 8
    step = replace(trace, device="cpu")  # requested bytes decide: no allocator between the bound and the plans
    done = []
    for plan in everything(step):
        result = simulate_step(step, plan, machine)
        done.append((result.peak_requested_bytes or 0, result.iteration_time_ns or 0))
    most, least = max(requested(step)), min(peak for peak, _ in done)
    assert least_memory(step) <= least
    for percent in (0, 20, 50, 80):
        budget = least + (most - least) * percent // 100
        optimum = min(time for peak, time in done if peak <= budget)
        assert bound(step, machine, budget) <= optimum
        planned = best_plan(step, machine, budget, Options(min_bytes=1))
        assert planned.result.fits
        assert planned.result.iteration_time_ns is not None
        assert planned.bound.time_ns <= planned.result.iteration_time_ns <= optimum * 1.25


# -- the program itself --------------------------------------------------------------------------


def test_less_memory_takes_no_less_time_and_a_faster_link_no_more() -> None:
    trace = conv_chain(batch=512, channels=(16, 32) * 6)
    most, least = max(requested(trace)), least_peak(trace)
    budgets = [least + (most - least) * percent // 100 for percent in (100, 80, 60, 40, 20, 5)]
    times = [bound(trace, MACHINE, budget) for budget in budgets]
    assert times == sorted(times)
    assert times[0] < times[-1]
    fast = replace(MACHINE, d2h_bytes_per_s=10**13, h2d_bytes_per_s=10**13, duplex_bytes_per_s=2 * 10**13)
    assert all(bound(trace, fast, budget) <= time for budget, time in zip(budgets, times, strict=True))


def test_merged_breakpoints_only_lower_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = conv_chain(batch=512, channels=(16, 32) * 10)
    most, least = max(requested(trace)), least_peak(trace)
    budget = least + (most - least) // 4
    fine = bound(trace, MACHINE, budget)
    monkeypatch.setattr("vdnn.planner.bound._MOST", 30)
    coarse = bound(trace, MACHINE, budget)
    assert coarse <= fine
    assert coarse >= fine * 0.9


def test_a_solver_that_gives_up_leaves_heuristics_and_says_so() -> None:
    trace = replace(conv_chain(batch=512, channels=(16, 32) * 6), device="cpu")  # requested bytes decide
    most, least = max(requested(trace)), least_peak(trace)
    planned = best_plan(trace, MACHINE, least + (most - least) // 2, Options(min_bytes=1), seconds=0.0)
    assert planned.result.fits
    assert any("the solver gave up after 0 s" in note for note in planned.plan.notes)


def test_codes_are_within_the_bound_too() -> None:
    """Pools ask for the form of their inputs alone: keeping just that was faster than the bound on every plan."""
    import torch
    from torch import nn

    import vdnn

    parts = [(nn.Conv2d(16, 64, 7, padding=3), nn.AvgPool2d(2, 1), nn.Conv2d(64, 16, 1)) for _ in range(3)]
    model = nn.Sequential(*(layer for part in parts for layer in part))
    trace = vdnn.capture(model, torch.randn(16, 16, 96, 96), device="cpu")
    machine = hardware("rtx4090")
    coded = simulate_step(trace, decide("encode", trace, machine, Options(min_bytes=1)), machine)
    assert coded.peak_requested_bytes < max(requested(trace))
    bound = time_bound(trace, machine, times_with(trace, machine, {}, ""), coded.peak_requested_bytes)
    assert bound.time_ns <= (coded.iteration_time_ns or 0)
