"""The search: what it returns fits, is the same every time, and is no slower than any policy."""

from __future__ import annotations

import gc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vdnn
from tests.strategies import hardwares, traces
from vdnn.analysis.liveness import requested
from vdnn.analysis.synthetic import conv_chain, transformer_chain
from vdnn.errors import InfeasibleError, PlanMismatchError
from vdnn.planner import best_plan, least_plan
from vdnn.planner.schedule import Step
from vdnn.planner.search import Search
from vdnn.policies import Options, decide
from vdnn.policies.candidates import survey
from vdnn.sim import simulate_step
from vdnn.sim.run import run
from vdnn.training import train
from vdnn.values import hardware

MACHINE = hardware("rtx4090")
TRACES = {
    "conv": conv_chain(batch=256, channels=(16, 32) * 5, size=64),
    "transformer": transformer_chain(blocks=6, batch=64),
}


@pytest.mark.parametrize(("name", "gpu"), [("conv", "rtx4090"), ("transformer", "rtx4090"), ("transformer", "gh200")])
def test_no_policy_that_the_engine_executes_is_faster_at_the_same_budget(name: str, gpu: str) -> None:
    trace, machine, options = TRACES[name], hardware(gpu), Options(min_bytes=1)
    baseline = simulate_step(trace, None, machine).peak_reserved_bytes
    least = least_plan(trace, machine, options).plan.budget_bytes
    assert baseline is not None
    assert least is not None
    for percent in (70, 40, 20):
        budget = least + (baseline - least) * percent // 100
        planned = best_plan(trace, machine, budget, options)
        assert planned.result.fits
        assert planned.gap >= 0
        for policy in ("vdnn-all", "vdnn-conv", "vdnn-dyn", "recompute", "recompute-offload", "encode-offload"):
            try:
                result = simulate_step(trace, decide(policy, trace, machine, options), machine, memory_limit=budget)
            except InfeasibleError:
                continue
            if result.fits:
                assert result.iteration_time_ns is not None
                assert planned.result.iteration_time_ns is not None
                assert planned.result.iteration_time_ns <= result.iteration_time_ns, policy


@pytest.mark.parametrize("name", TRACES)
def test_the_least_budget_is_no_larger_than_any_policys(name: str) -> None:
    trace, options = TRACES[name], Options(min_bytes=1)
    least = least_plan(trace, MACHINE, options).plan.budget_bytes
    assert least is not None
    for policy in ("none", "vdnn-all", "vdnn-conv", "recompute-offload", "chen-sqrt-n"):
        plan = decide(policy, trace, MACHINE, options)
        assert not simulate_step(trace, plan, MACHINE, memory_limit=least * 98 // 100).fits, policy


def test_the_same_question_has_the_same_answer() -> None:
    trace = TRACES["conv"]
    plans = [vdnn.plan(trace, MACHINE, budget=500 << 20, min_bytes=1) for _ in range(2)]
    assert plans[0] == plans[1]
    assert plans[0].fingerprint() == plans[1].fingerprint()


def test_planning_rests_the_collector_of_cycles_and_wakes_it_whatever_happens() -> None:
    assert gc.isenabled()
    with pytest.raises(InfeasibleError):
        best_plan(TRACES["conv"], MACHINE, 1 << 20)
    assert gc.isenabled()
    collections = gc.get_stats()[2]["collections"]
    best_plan(TRACES["conv"], MACHINE, 500 << 20)
    assert gc.get_stats()[2]["collections"] == collections
    gc.disable()
    try:
        best_plan(TRACES["conv"], MACHINE, 500 << 20)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_plan_for_another_trace_is_refused() -> None:
    plan = vdnn.plan(TRACES["conv"], MACHINE, budget=500 << 20, min_bytes=1)
    with pytest.raises(PlanMismatchError):
        vdnn.simulate(TRACES["transformer"], plan, MACHINE)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_the_scheduler_says_of_memory_is_what_liveness_says(data: st.DataObject) -> None:
    trace, machine = data.draw(traces()), data.draw(hardwares())
    step = Step(trace, machine, [1000] * len(trace.ops))
    parcels = [p for i in survey(trace, Options(min_bytes=0)) if i.movable and (p := step.parcel(i)) is not None]
    most = max(requested(trace), default=0)
    for target in (0, most // 2, most):
        for prefetch in (True, False):
            schedule = step.schedule(parcels, target, 1, prefetch)
            assert step.peak_bytes(schedule.moves) == max(requested(trace, schedule.moves), default=0)
            assert step.time_ns(schedule.moves) == run(trace, schedule.moves, step.op_ns, machine).total_ns
            assert set(schedule.actions) == {p.item.storage for p in parcels}


def test_runs_of_recomputation_are_cut_where_they_grow_too_long() -> None:
    search = Search(TRACES["conv"], MACHINE, Options(min_bytes=1))
    found = search.choices.chains
    everything = search.cut(found, 1 << 60)
    assert everything == frozenset(found)
    some = search.cut(found, 0)
    assert some < everything
    storages = search.trace.storages
    for s in some:  # none is made from another that is made again, too
        assert search.trace.saved[found[s].source].storage not in some or not storages[s].nbytes


NETWORKS = [
    ("demo:cnn", 8, {}),
    ("torchvision:vgg11_bn", 2, {"image_size": 64}),
    ("torchvision:densenet121", 2, {"image_size": 64}),
    ("torchvision:mobilenet_v2", 4, {"image_size": 64}),
    ("torchvision:googlenet", 2, {"image_size": 96}),
    ("torchvision:vit_b_16", 1, {"image_size": 224}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch", "options"), NETWORKS)
def test_budgets_hold_on_a_virtual_device(name: str, batch: int, options: dict[str, object]) -> None:
    """Gradients are equal bit for bit, the measured peak is within the budget and within 1 % of the predicted one."""
    work = vdnn.load(name, batch=batch, **options)
    trace = vdnn.capture(work, device="cpu", optimizer="sgd")
    plain = train(work, None, "virtual", MACHINE, steps=2, optimizer="sgd")
    most = simulate_step(trace, None, MACHINE).peak_requested_bytes
    least = least_plan(trace, MACHINE, Options(min_bytes=1)).plan.budget_bytes
    assert most is not None
    assert least is not None
    assert plain.result.peak_requested_bytes == most
    for percent in (90, 70, 50, 25, 10, 0):
        budget = least + (most - least) * percent // 100
        planned = best_plan(trace, MACHINE, budget, Options(min_bytes=1))
        done = train(work, planned.plan, "virtual", MACHINE, steps=2, optimizer="sgd", expected=plain.steps)
        assert done.differs == ""
        assert done.result.peak_requested_bytes is not None
        assert done.result.peak_requested_bytes <= budget
        assert done.result.peak_requested_bytes == pytest.approx(planned.result.peak_requested_bytes, rel=0.01)
