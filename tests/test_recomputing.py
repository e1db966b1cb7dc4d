"""Feature maps that are dropped and computed again: the step stays the same step, with less memory and more work."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdnn.analysis.chains import makers
from vdnn.analysis.liveness import peak
from vdnn.analysis.moments import resolve
from vdnn.analysis.recomputing import makeable, recompute, recomputed, regenerators
from vdnn.analysis.synthetic import conv_chain, fork_join, transformer_chain
from vdnn.engine import Schedule
from vdnn.errors import EngineError, PlanMismatchError
from vdnn.policies import Options, decide
from vdnn.sim import simulate_step
from vdnn.values import Offload, Recompute, Trace, hardware

TITAN = hardware("titan-x")
DEEP = conv_chain(channels=(16,) * 16, batch=8, size=32, pool_every=0)
OPTIONS = Options(min_bytes=0, keep_soon=False)


def droppable(trace: Trace) -> list[int]:
    saved = {t.storage for t in trace.saved if t.module >= 0}
    return [
        i
        for i in sorted(saved)
        if trace.storages[i].category == "activation"
        and not trace.storages[i].held
        and regenerators(trace, i) is not None
        and trace.storages[i].release < trace.storages[i].need
    ]


def test_one_dropped_map_is_made_again_where_backward_asks_for_it() -> None:
    trace = conv_chain(channels=(8, 8, 8), pool_every=0)
    middle = next(t.storage for t in trace.saved if trace.module_name(t.module) == "conv2#0")
    step = recompute(trace, [middle])
    again = [op.name for op in step.ops[trace.forward_end :]][: step.storages[-1].alloc + 2 - trace.forward_end]
    assert again[-2:] == ["convolution", "relu_"], "the CONV that makes it, and the ReLU in place"
    assert len(step.ops) == len(trace.ops) + 2
    assert step.storages[middle].free == step.storages[middle].release
    assert step.storages[-1].alloc == step.storages[-1].alloc
    assert step.storages[-1].nbytes == trace.storages[middle].nbytes


@given(st.sampled_from([conv_chain, fork_join, transformer_chain]), st.data())
def test_whatever_is_dropped_the_step_is_whole(make, data) -> None:  # type: ignore[no-untyped-def]
    """Every op reads and writes what is live (`check`), and forward and all of the old backward are still there."""
    trace = make()
    dropped = data.draw(st.sets(st.sampled_from(droppable(trace))))
    step = recompute(trace, dropped)
    step.check()
    assert [op.name for op in step.ops[: step.forward_end]] == [op.name for op in trace.ops[: trace.forward_end]]
    more = len(step.ops) - len(trace.ops)
    assert (more > 0) == bool(dropped)
    left = [op.name for op in step.ops[step.forward_end :]]
    for op in trace.ops[trace.forward_end :]:  # in the same order
        while left.pop(0) != op.name:
            pass


@given(st.data())
def test_what_is_dropped_is_computed_once(data) -> None:  # type: ignore[no-untyped-def]
    dropped = data.draw(st.sets(st.sampled_from(droppable(DEEP)), min_size=1))
    step = recompute(DEEP, dropped)
    made = makers(DEEP)
    again = sum(len(made[s]) for s in dropped)
    assert len(step.ops) - len(DEEP.ops) == again


def test_a_trace_without_recomputation_is_itself() -> None:
    assert recomputed(DEEP, None) is DEEP
    assert recomputed(DEEP, decide("vdnn-all", DEEP, TITAN)) is DEEP


def test_what_nothing_makes_cannot_be_made_again() -> None:
    batch = next(i for i, s in enumerate(DEEP.storages) if s.category == "input")
    with pytest.raises(PlanMismatchError, match="cannot be computed again"):
        recompute(DEEP, [batch])


def test_what_depends_on_a_random_draw_that_is_gone_stays() -> None:
    """conv2's input is conv1's result; say that what makes the stem's result draws random numbers."""
    trace = conv_chain(channels=(8, 8, 8), pool_every=0)
    first, second = sorted(droppable(trace))[:2]
    ops = tuple(replace(op, name="dropout") if first in op.writes and op.kernel == "conv" else op for op in trace.ops)
    drawn = replace(trace, ops=ops)
    assert makeable(drawn, [first, second]) == {second}
    assert makeable(trace, [first, second]) == {first, second}
    assert (
        makeable(drawn, [second], away=[first]) == {second} or drawn.storages[first].need > drawn.storages[second].need
    )


def test_chen_s_peak_grows_with_the_root_of_the_depth() -> None:
    """Of a chain of equal layers √n checkpoints and one segment are held at once, and forward runs once more."""
    peaks = {}
    for depth in (16, 64):
        trace = conv_chain(channels=(16,) * depth, batch=8, size=32, pool_every=0)
        plan = decide("chen-sqrt-n", trace, TITAN, OPTIONS)
        step = recomputed(trace, plan)
        one = max(s.nbytes for s in trace.storages if s.category == "activation")
        peaks[depth] = peak(step, resolve(plan, step)).nbytes / one
        flops = sum(op.flops for op in step.ops) / sum(op.flops for op in trace.ops)
        assert 1.15 < flops < 1.34
        assert peaks[depth] < 0.75 * peak(trace).nbytes / one
    assert peaks[64] - peaks[16] < 14, "4 more checkpoints and 4 more in a segment, not 48 more maps; weights beside"


def test_capuchin_does_nothing_while_the_step_fits() -> None:
    plan = decide("capuchin", DEEP, TITAN, OPTIONS)
    assert plan.offloaded_bytes == 0
    assert recomputed(DEEP, plan) is DEEP


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_capuchin_fits_the_budget(share: float) -> None:
    trace = conv_chain(channels=(64,) * 24, batch=16, size=64, pool_every=0)
    budget = int(peak(trace).nbytes * share)
    plan = decide("capuchin", trace, TITAN, replace(OPTIONS, budget_bytes=budget))
    step = recomputed(trace, plan)
    assert peak(step, resolve(plan, step)).nbytes <= budget
    assert any(isinstance(e.action, Offload | Recompute) for e in plan.entries)


def test_capuchin_recomputes_what_a_slow_link_would_stall() -> None:
    trace = conv_chain(channels=(16,) * 24, batch=8, size=32, pool_every=0)
    slow = replace(TITAN, d2h_bytes_per_s=10**8, h2d_bytes_per_s=10**8, duplex_bytes_per_s=2 * 10**8)
    budget = peak(trace).nbytes * 3 // 4
    plan = decide("capuchin", trace, slow, replace(OPTIONS, budget_bytes=budget))
    assert any(isinstance(e.action, Recompute) for e in plan.entries)
    fast = replace(TITAN, d2h_bytes_per_s=10**13, h2d_bytes_per_s=10**13, link_latency_ns=0)
    plan = decide("capuchin", trace, fast, replace(OPTIONS, budget_bytes=budget))
    assert not any(isinstance(e.action, Recompute) for e in plan.entries)


def test_vdnn_plus_plus_moves_what_vdnn_moves_and_waits_less() -> None:
    trace = conv_chain(channels=(64,) * 8, batch=32, size=64, pool_every=2)
    paper = decide("vdnn-all", trace, TITAN, Options(rules="paper", min_bytes=0))
    plus = decide("vdnn++", trace, TITAN, Options(min_bytes=0))
    assert plus.offloaded_bytes == paper.offloaded_bytes
    wide = decide("vdnn++", trace, TITAN, Options(min_bytes=0, max_inflight_bytes=1 << 40, window_bytes=1 << 40))
    slow, fast = (simulate_step(trace, plan, TITAN).forward_time_ns for plan in (paper, wide))
    assert fast < slow, "with room for what is on its way, no layer's end waits for a copy"


def test_the_engine_says_that_it_does_not_recompute_single_maps() -> None:
    with pytest.raises(EngineError, match="policy checkpoint"):
        Schedule(decide("chen-sqrt-n", DEEP, TITAN, OPTIONS))


def test_a_plan_that_recomputes_goes_through_the_simulator() -> None:
    plan = decide("chen-sqrt-n", DEEP, TITAN, OPTIONS)
    result = simulate_step(DEEP, plan, TITAN, timeline=True)
    base = simulate_step(DEEP, None, TITAN)
    assert result.peak_requested_bytes < base.peak_requested_bytes
    assert result.iteration_time_ns > base.iteration_time_ns
