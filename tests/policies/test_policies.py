"""What every policy's plan must satisfy, and what the event rules promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import hardwares, traces
from vdnn.analysis.liveness import peak, requested
from vdnn.analysis.moments import Points, resolve
from vdnn.analysis.synthetic import Tape, conv_chain, fork_join, transformer_chain
from vdnn.errors import UsageError
from vdnn.policies import Options, decide, names
from vdnn.policies.plans import covers_half
from vdnn.values import Keep, Offload, Trace, hardware

GPU = hardware("titan-x")
POLICIES = ["none", "vdnn-all", "vdnn-conv"]
sizes = st.none() | st.integers(0, 1 << 16)
options_drawn = st.builds(
    Options,
    rules=st.sampled_from(["event", "paper"]),
    min_bytes=st.integers(0, 1 << 12),
    max_inflight_bytes=sizes,
    window_bytes=sizes,
    keep_soon=st.booleans(),
)


def test_the_first_policies_are_there():
    assert set(POLICIES) <= set(names())


@given(traces(), hardwares(), st.sampled_from(POLICIES), options_drawn)
def test_a_plan_resolves_on_its_trace_and_explains_itself(trace, machine, policy, options):
    plan = decide(policy, trace, machine, options)
    moves = resolve(plan, trace)
    points = Points(trace)
    assert {i for e in plan.entries for i in map(points.find, e.saved)} == set(range(len(trace.saved)))
    assert len(plan.entries) == len({t.storage for t in trace.saved})
    assert all(entry.action.why for entry in plan.entries if isinstance(entry.action, Keep))
    for move in moves:
        s = trace.storages[move.storage]
        assert s.category in ("activation", "input")
        assert not s.held
        assert s.nbytes >= options.min_bytes
        assert s.need > max(s.release, move.out[0])
        assert move.out <= move.release < move.fetch <= move.need
    pairs = zip(requested(trace, moves), requested(trace), strict=True)
    assert all(with_plan <= without for with_plan, without in pairs), "offloading never adds memory anywhere"


@given(traces(), options_drawn)
def test_no_more_than_the_bound_is_on_its_way_out(trace, options):
    """Counted at every point of forward; what the forward itself still holds cannot be released and may exceed it."""
    plan = decide("vdnn-all", trace, GPU, replace(options, rules="event"))
    moves = [m for m in resolve(plan, trace) if plan.entries[m.entry].action.whole]
    points = Points(trace)
    marks = [points.pack(i) for i in range(len(trace.saved))] + [points.end(i) for i in range(len(trace.modules))]
    last = max((m.release for m in moves), default=(0, 0))
    for mark in sorted(marks):
        on_way = [m for m in moves if m.out <= mark < m.release]
        free = [
            m
            for m in on_way
            if trace.storages[m.storage].release <= mark[0]
            and all(points.pack(i) <= mark for i, t in enumerate(trace.saved) if t.storage == m.storage)
        ]
        if mark < last and sum(m.nbytes for m in on_way) > plan.max_inflight_bytes:
            assert not free


@given(traces(), options_drawn)
def test_no_more_than_the_window_is_fetched_ahead(trace, options):
    plan = decide("vdnn-all", trace, GPU, replace(options, rules="event"))
    moves = [m for m in resolve(plan, trace) if plan.entries[m.entry].action.whole]
    window = max((m.nbytes for m in moves), default=0) if options.window_bytes is None else options.window_bytes
    for mark in sorted(m.fetch for m in moves):
        ahead = [m for m in moves if m.fetch <= mark < m.need]
        assert sum(m.nbytes for m in ahead) <= window or len(ahead) == 1
    order = sorted(moves, key=lambda m: m.need)
    assert [m.fetch for m in order] == sorted(m.fetch for m in order), "first needed, first fetched"


@pytest.mark.parametrize("trace", [conv_chain(), fork_join(), transformer_chain()], ids=lambda t: t.model)
def test_a_wider_bound_never_needs_less_memory(trace):
    peaks = []
    for bound in (0, 1 << 16, 1 << 18, 1 << 20, 1 << 30):
        plan = decide("vdnn-all", trace, GPU, Options(min_bytes=0, max_inflight_bytes=bound, keep_soon=False))
        assert plan.max_inflight_bytes == bound
        peaks.append(peak(trace, resolve(plan, trace)).nbytes)
    assert peaks == sorted(peaks)
    assert peaks[0] < peak(trace).nbytes


def test_what_is_needed_before_its_copy_could_be_over_stays():
    slow = replace(GPU, d2h_bytes_per_s=10**6)
    plan = decide("vdnn-all", conv_chain(), slow, Options(min_bytes=0))
    last = next(e for e in plan.entries if str(e.saved[0]) == "fc#0/0")
    assert isinstance(last.action, Keep)
    assert "before its copy out over the link of titan-x" in last.action.why
    eager = decide("vdnn-all", conv_chain(), slow, Options(min_bytes=0, keep_soon=False))
    assert isinstance(next(e for e in eager.entries if str(e.saved[0]) == "fc#0/0").action, Offload)


def views_of_a_large_storage(elements: int) -> Trace:
    """Two saved views of `elements` floats each, side by side in a storage of 250 floats."""
    tape = Tape("views", 1)
    trace = tape.finish(tape.linear("fc", tape.conv("conv", tape.input(1, 1, 5, 5), 10), 3), optimizer=False)
    (at,) = [i for i, t in enumerate(trace.saved) if t.module > 0 and t.shape == (1, 250)]
    view = replace(trace.saved[at], shape=(elements,), stride=(1,), nbytes=4 * elements)
    second = replace(view, index=9, offset=elements)
    return replace(trace, saved=(*trace.saved[:at], view, second, *trace.saved[at + 1 :]))


@pytest.mark.parametrize(("elements", "whole"), [(62, False), (63, True)])
def test_a_storage_of_which_little_is_saved_does_not_move_whole(elements, whole):
    """2 · 62 of 250 floats are less than half, 2 · 63 are more."""
    trace = views_of_a_large_storage(elements)
    (tensors,) = {
        t.storage: tuple(i for i, u in enumerate(trace.saved) if u.storage == t.storage)
        for t in trace.saved
        if t.shape == (elements,)
    }.values()
    assert covers_half(trace, trace.saved[tensors[0]].storage, tensors) is whole
    plan = decide("vdnn-all", trace, GPU, Options(min_bytes=0, keep_soon=False))
    (entry,) = [e for e in plan.entries if len(e.saved) == 2 and e.storage_bytes == 1000]
    assert isinstance(entry.action, Offload)
    assert entry.action.whole is whole


def test_overlapping_views_are_not_counted_twice():
    trace = views_of_a_large_storage(100)
    same = tuple(replace(t, offset=0) if t.index == 9 else t for t in trace.saved)
    trace = replace(trace, saved=same)
    tensors = tuple(i for i, t in enumerate(trace.saved) if t.shape == (100,))
    assert not covers_half(trace, trace.saved[tensors[0]].storage, tensors)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("held by output until backward", {"held": "output"}),
        ("a parameter: not a feature map", {"category": "parameter"}),
        ("low-precision copy", {"name": "cast of conv1.weight"}),
        ("smaller than", {"nbytes": 4}),
    ],
)
def test_a_storage_that_must_stay_says_why(reason, changes):
    trace = conv_chain()
    index = next(t.storage for t in trace.saved if t.node.startswith("Relu"))
    storages = list(trace.storages)
    storages[index] = replace(storages[index], **changes)
    plan = decide("vdnn-all", replace(trace, storages=tuple(storages)), GPU, Options(min_bytes=8))
    action = next(e.action for e in plan.entries if str(e.saved[0]) == "relu0#0/0")
    assert isinstance(action, Keep)
    assert reason in action.why


def test_small_storages_stay_by_default():
    plan = decide("vdnn-all", conv_chain(batch=1), GPU)
    assert plan.offloaded_bytes == 0
    assert any(isinstance(e.action, Keep) and e.action.why == "smaller than 1.0 MiB" for e in plan.entries)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vdn-conv", Options(), "did you mean vdnn-conv"),
        ("swap", Options(), "unknown policy 'swap'"),
        ("vdnn-all", Options(rules="papers"), "did you mean paper"),
        ("vdnn-all", Options(min_bytes=-1), "min_bytes is -1"),
        ("vdnn-all", Options(window_bytes=1.5), "window_bytes is 1.5"),
    ],
)
def test_a_wrong_name_or_option_is_told_before_any_work(name, options, message):
    with pytest.raises(UsageError, match=message):
        decide(name, None, GPU, options)  # type: ignore[arg-type]
