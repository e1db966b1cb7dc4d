"""`check()` names the first thing wrong; points of a plan are texts with one form."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import traces
from vdnn.errors import FormatError
from vdnn.values import Entry, Keep, Offload, Plan, Point, RunResult, SavedName, Span, Stall, Timeline, Trace

NAME = SavedName("conv1", 0, 0, "float32", 4, 64)


def plan(*entries: Entry, **fields: Any) -> Plan:
    return Plan("all", "m", 1, "cuda", "", None, entries, **fields)


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ("pack features.3#0/1", Point("pack", "features.3", 0, 1)),
        ("end features.3#12", Point("end", "features.3", 12)),
        ("unpack #0/0", Point("unpack", "", 0, 0)),
        ("unpack <outside>#0/7", Point("unpack", "<outside>", 0, 7)),
        ("pack odd#name#1/0", Point("pack", "odd#name", 1, 0)),
    ],
)
def test_a_point_is_read_from_its_text_and_written_back(text: str, point: Point) -> None:
    assert Point.parse(text) == point
    assert str(point) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pack",
        "pack a",
        "pack a#0",
        "end a#0/1",
        "unpack a#0",
        "free a#0/1",
        "pack a#x/0",
        "pack a#0/1 ",
        "pack a#-1/0",
    ],
)
def test_a_text_that_is_no_point_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="is not a point: write 'pack"):
        Point.parse(text)


def test_a_plan_names_a_saved_tensor_only_once() -> None:
    with pytest.raises(FormatError, match="saved tensor conv1#0/0 is in two entries"):
        plan(Entry((NAME, NAME), 64, Keep())).check()
    with pytest.raises(FormatError, match="saved tensor conv1#0/0 is in two entries"):
        plan(Entry((NAME,), 64, Keep()), Entry((NAME,), 64, Offload("end conv1#0"))).check()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (Offload("unpack conv1#0/0"), "release_at 'unpack conv1#0/0' is not in forward"),
        (Offload("end conv1#0", "end conv1#0"), "'end conv1#0' is not in backward"),
        (Offload("end conv1#0", "", "pack conv1#0/0"), "'pack conv1#0/0' is not in backward"),
        (Offload("soon"), "'soon' is not a point"),
    ],
)
def test_a_plan_releases_in_forward_and_prefetches_in_backward(action: Offload, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        plan(Entry((NAME,), 64, action)).check()


def test_a_plan_has_no_empty_entry_and_no_negative_size() -> None:
    with pytest.raises(FormatError, match="names no saved tensor"):
        plan(Entry((), 64, Keep())).check()
    with pytest.raises(FormatError, match="must not be negative"):
        plan(min_bytes=-1).check()


def test_offloaded_bytes_counts_whole_storages_or_the_views_that_move() -> None:
    other = dataclasses.replace(NAME, index=1)
    whole = Entry((NAME,), 100, Offload("end conv1#0"))
    views = Entry((other,), 100, Offload("end conv1#0", whole=False))
    assert plan(whole, views).offloaded_bytes == 100 + 64


@given(st.data())
def test_a_trace_with_an_impossible_number_is_refused(data: st.DataObject) -> None:
    """Each of these breaks one promise of the trace; `check` must notice every one."""
    trace = data.draw(traces())
    n = len(trace.ops)
    i = data.draw(st.integers(0, n - 1))
    s = data.draw(st.integers(0, len(trace.storages) - 1))

    def op(**fields: Any) -> Trace:
        return dataclasses.replace(
            trace, ops=(*trace.ops[:i], dataclasses.replace(trace.ops[i], **fields), *trace.ops[i + 1 :])
        )

    def storage(**fields: Any) -> Trace:
        new = dataclasses.replace(trace.storages[s], **fields)
        return dataclasses.replace(trace, storages=(*trace.storages[:s], new, *trace.storages[s + 1 :]))

    broken = [
        op(flops=-1),
        op(module=len(trace.modules)),
        op(reads=(len(trace.storages),)),
        op(writes=(-1,)),
        storage(nbytes=-1),
        storage(free=n + 1),
        storage(alloc=n, free=n),
        storage(release=n + 2),
    ]
    if not any(saved.storage == s for saved in trace.saved):
        broken.append(storage(need=n))
    touched = [j for j, o in enumerate(trace.ops) if s in o.reads + o.writes]
    if touched:
        broken.append(storage(free=touched[-1], release=0))
    for wrong in broken:
        with pytest.raises(FormatError):
            wrong.check()


@given(traces())
def test_the_phases_of_a_trace_meet_at_forward_end_and_backward_end(trace: Trace) -> None:
    assert 0 < trace.forward_end <= trace.backward_end <= len(trace.ops)
    phases = [op.phase for op in trace.ops]
    assert set(phases[: trace.forward_end]) == {"forward"}
    assert set(phases[trace.forward_end : trace.backward_end]) == {"backward"}
    assert set(phases[trace.backward_end :]) <= {"optimizer"}


def test_a_timeline_s_spans_do_not_overlap_and_end_after_they_start() -> None:
    a = Span("compute", "a", "forward", 0, 10, 0)
    with pytest.raises(FormatError, match="'b' starts before the one before it ends"):
        Timeline(spans=(a, Span("compute", "b", "forward", 9, 12, 0))).check()
    Timeline(spans=(a, Span("offload", "b", "forward", 9, 12, 0))).check()
    with pytest.raises(FormatError, match="ends before it starts"):
        Timeline(spans=(Span("compute", "b", "forward", 9, 8, 0),)).check()
    with pytest.raises(FormatError, match="stall of compute for 'x' ends before it starts"):
        Timeline(stalls=(Stall("compute", "fetch", "x", 2, 1),)).check()


def test_a_result_has_no_negative_number() -> None:
    result = RunResult("measured", "m", 1, "cpu", "none", "fp32", "", "", stall_ns=-1)
    with pytest.raises(FormatError, match="stall_ns is -1"):
        result.check()
