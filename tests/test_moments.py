"""Plans against traces: points become moments, and what does not belong is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vdnn.analysis.liveness import host_bytes, largest_working_set, least_peak, peak, requested, reuse_distances
from vdnn.analysis.moments import Points, resolve
from vdnn.analysis.synthetic import Tape, conv_chain, fork_join, transformer_chain
from vdnn.errors import FormatError, PlanMismatchError
from vdnn.policies import Options, decide
from vdnn.values import Entry, Keep, Offload, Plan, SavedName, Storage, Trace, hardware

TRACE = conv_chain()
PLAN = decide("vdnn-all", TRACE, hardware("titan-x"), Options(min_bytes=0, keep_soon=False))


def with_entry(plan: Plan, index: int, **changes: object) -> Plan:
    entries = list(plan.entries)
    entries[index] = replace(entries[index], **changes)
    return replace(plan, entries=tuple(entries))


def entry_of(plan: Plan, name: str) -> int:
    return next(i for i, e in enumerate(plan.entries) if any(str(n) == name for n in e.saved))


def test_the_end_of_a_call_comes_after_its_own_packs_and_before_its_followers():
    """relu0 packs its result after its op, at the position where conv1 packs the same storage before its own."""
    points = Points(TRACE)
    names = {str(name): i for i, name in enumerate(points.names)}
    calls = {call.fqn: i for i, call in enumerate(TRACE.modules)}
    result, following = points.pack(names["relu0#0/0"]), points.pack(names["conv1#0/0"])
    assert result[0] == following[0]
    assert result < points.end(calls["relu0"]) < following
    assert points.end(calls["fc"]) == points.end(0) < points.pack(names["<outside>#0/0"])


def test_unpacks_come_after_packs_at_the_border_of_forward_and_backward():
    points = Points(TRACE)
    border = [points.pack(i) for i in range(len(TRACE.saved))]
    first = min(m for i in range(len(TRACE.saved)) if (m := points.unpack(i)) is not None)
    assert max(border) < first


@pytest.mark.parametrize("changed", [{"dtype": "float16"}, {"rank": 3}, {"nbytes": 4}], ids=str)
def test_a_saved_tensor_that_differs_is_named_with_both_forms(changed):
    name = PLAN.entries[0].saved[0]
    plan = with_entry(PLAN, 0, saved=(replace(name, **changed), *PLAN.entries[0].saved[1:]))
    with pytest.raises(PlanMismatchError, match=r"conv0#0/0.*rank 4") as caught:
        resolve(plan, TRACE)
    assert str(next(iter(changed.values()))) in str(caught.value)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (Offload("pack nowhere#0/0"), "'pack nowhere#0/0' is a saved tensor that the trace of synthetic:conv_chain"),
        (Offload("end nowhere#0"), "'end nowhere#0' is a module call that"),
        (Offload("end conv1#0", "unpack fc#0/9"), "'unpack fc#0/9'"),
        (Offload("pack conv0#0/0"), "releases relu0#0/0 at 'pack conv0#0/0', before the last"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_point_that_the_trace_does_not_have_is_named(action, message):
    plan = with_entry(PLAN, entry_of(PLAN, "relu0#0/0"), action=action)
    with pytest.raises(PlanMismatchError) as caught:
        resolve(plan, TRACE)
    assert message in str(caught.value)


def test_a_text_that_is_no_point_is_a_format_error():
    plan = with_entry(PLAN, entry_of(PLAN, "relu0#0/0"), action=Offload("after conv1#0"))
    with pytest.raises(FormatError, match="after conv1#0"):
        resolve(plan, TRACE)


def test_a_plan_for_another_model_batch_or_device_is_refused():
    with pytest.raises(PlanMismatchError, match="make the plan from this trace"):
        resolve(PLAN, conv_chain(batch=16))
    with pytest.raises(PlanMismatchError, match=r"conv0#0/0, which the trace of synthetic:transformer_chain"):
        resolve(PLAN, transformer_chain())
    with pytest.raises(PlanMismatchError, match="step of a cpu device"):
        resolve(replace(PLAN, device="cpu"), TRACE)


def test_an_entry_must_hold_one_storage_whole():
    i = entry_of(PLAN, "relu0#0/0")
    shared = PLAN.entries[i]
    assert len(shared.saved) == 2
    with pytest.raises(PlanMismatchError, match="leaves out conv1#0/0"):
        resolve(with_entry(PLAN, i, saved=shared.saved[:1]), TRACE)
    with pytest.raises(PlanMismatchError, match="another storage"):
        resolve(with_entry(PLAN, i, saved=(*shared.saved, PLAN.entries[0].saved[0])), TRACE)
    twice = replace(PLAN, entries=(*PLAN.entries, Entry(shared.saved[1:], shared.storage_bytes, Keep())))
    with pytest.raises(PlanMismatchError, match="another entry"):
        resolve(twice, TRACE)
    with pytest.raises(PlanMismatchError, match="has 5 bytes"):
        resolve(with_entry(PLAN, i, storage_bytes=5), TRACE)


def test_what_only_a_run_can_do_by_rule_is_refused():
    plan = replace(PLAN, entries=PLAN.entries[2:], default="offload", min_bytes=0)
    with pytest.raises(PlanMismatchError, match=r"no entry for conv0#0/0.*by rule"):
        resolve(plan, TRACE)
    resolve(replace(plan, min_bytes=1 << 40), TRACE)


# -- lifetimes -----------------------------------------------------------------------------------


def two_saved_views(held: str = "") -> Trace:
    """An activation of 1000 bytes of which two views of 40 bytes are saved, one of them twice."""
    tape = Tape("views", 1)
    x = tape.conv("conv", tape.input(1, 1, 5, 5), 10)
    trace = tape.finish(tape.linear("fc", x, 3), optimizer=False)
    (index,) = [i for i, s in enumerate(trace.storages) if s.nbytes == 1000 and s.category == "activation"]
    (first,) = [i for i, t in enumerate(trace.saved) if t.storage == index]
    view = replace(trace.saved[first], shape=(10,), stride=(1,), nbytes=40)
    views = (view, replace(view, index=5, offset=20), replace(view, index=6, offset=20))
    storages = list(trace.storages)
    if held:
        storages[index] = replace(storages[index], held=held, release=storages[index].free)
    saved = trace.saved[:first] + views + trace.saved[first + 1 :]
    return replace(trace, saved=saved, storages=tuple(storages))


def view_plan(trace: Trace, whole: bool) -> Plan:
    points = Points(trace)
    names = tuple(points.names[i] for i, t in enumerate(trace.saved) if t.module >= 0 and t.nbytes == 40)
    entry = Entry(names, 1000, Offload("end fc#0", whole=whole))
    return Plan("hand", trace.model, 1, "cuda", "", None, (entry,))


def test_views_that_move_alone_come_back_at_their_own_size():
    trace = two_saved_views()
    whole, alone = (resolve(view_plan(trace, whole), trace) for whole in (True, False))
    assert [m.nbytes for m in whole] == [1000]
    assert [m.nbytes for m in alone] == [40, 40]  # two tensors share one view: it moves once
    baseline, with_whole, with_views = (requested(trace, m) for m in ((), whole, alone))
    need = alone[0].need[0]
    assert baseline[need] - with_whole[need] == 0
    assert baseline[need] - with_views[need] == 1000 - 80
    assert baseline[need - 1] - with_views[need - 1] == 1000
    assert max(host_bytes(trace, alone)) == 80


def test_a_storage_that_somebody_holds_costs_extra_when_it_is_offloaded():
    trace = two_saved_views(held="output")
    moves = resolve(view_plan(trace, True), trace)
    extra = [more - less for more, less in zip(requested(trace, moves), requested(trace), strict=True)]
    assert {*extra} == {0, 1000}


def test_the_peak_is_told_by_category_and_module():
    found = peak(TRACE)
    assert found.nbytes == max(requested(TRACE)) == sum(item.nbytes for item in found.items)
    assert {item.module for item in found.items if item.category == "parameter"} == {""}
    assert "conv0#0" in {item.module for item in found.items if item.category == "activation"}


@pytest.mark.parametrize("trace", [conv_chain(), fork_join(), transformer_chain()], ids=lambda t: t.model)
def test_bounds_are_below_every_plan(trace):
    machine = hardware("titan-x")
    eager = Options(min_bytes=0, max_inflight_bytes=0, window_bytes=0, keep_soon=False)
    plan = decide("vdnn-all", trace, machine, eager)
    lowest = peak(trace, resolve(plan, trace)).nbytes
    assert largest_working_set(trace) <= least_peak(trace) <= lowest <= peak(trace).nbytes
    assert lowest == least_peak(trace)  # released at once, fetched on demand: nothing less is possible


def test_a_step_without_ops_has_no_peak():
    empty = replace(TRACE, ops=(), saved=(), modules=(), storages=())
    assert peak(empty).nbytes == least_peak(empty) == largest_working_set(empty) == 0


def test_reuse_distance_falls_along_the_network():
    """Layers near the loss are needed soonest (paper, Fig. 6)."""
    distances = reuse_distances(TRACE, [100] * len(TRACE.ops))
    maps = [t.storage for t in TRACE.saved if t.node == "ConvolutionBackward0" and t.index == 0]
    along = [distances[i] for i in maps]
    assert along == sorted(along, reverse=True)
    first = TRACE.storages[maps[0]]
    assert along[0] == 100 * (first.need - TRACE.saved[0].packed_at)


def test_a_name_that_is_not_packed_says_what_is_there():
    points = Points(TRACE)
    with pytest.raises(PlanMismatchError, match="packs fewer"):
        points.find(SavedName("conv0", 0, 7, "float32", 4, 4))
    assert isinstance(TRACE.storages[0], Storage)
