"""The simulator against an oracle of its own, and against examples worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sim.oracle import check_step, requested_by_op
from tests.strategies import hardwares, plans_for, traces
from vdnn.analysis.liveness import requested
from vdnn.analysis.moments import Points, resolve
from vdnn.analysis.synthetic import conv_chain, fork_join, transformer_chain
from vdnn.costs import op_times
from vdnn.errors import UsageError
from vdnn.policies import Options, decide
from vdnn.sim import simulate_step
from vdnn.sim.run import run
from vdnn.sim.workspaces import with_libraries
from vdnn.values import Entry, Hardware, Offload, Peak, Plan, Trace, dumps, hardware

CHAINS = [conv_chain(), fork_join(), transformer_chain(blocks=2)]


@st.composite
def any_plans(draw: st.DrawFn, trace: Trace) -> Plan:
    """Plans for a trace with later releases, prefetches anywhere in backward, and waits before the need."""
    plan = draw(plans_for(trace))
    points = Points(trace)
    forward = [(points.pack(i), f"pack {points.names[i]}") for i in range(len(trace.saved))]
    forward += [(points.end(i), f"end {c.fqn}#{c.call}") for i, c in enumerate(trace.modules)]
    unpacks = [f"unpack {points.names[i]}" for i, t in enumerate(trace.saved) if t.unpacked_at]
    entries = []
    for entry in plan.entries:
        if isinstance(entry.action, Offload):
            last = max(points.pack(points.find(name)) for name in entry.saved)
            action = Offload(
                draw(st.sampled_from([text for moment, text in sorted(forward) if moment >= last])),
                draw(st.sampled_from(["", *unpacks])),
                draw(st.sampled_from(["", *unpacks])),
                draw(st.booleans()),
            )
            entry = Entry(entry.saved, entry.storage_bytes, action)
        entries.append(entry)
    plan = replace(plan, entries=tuple(entries), device=trace.device)
    plan.check()
    return plan


@given(st.data(), traces(), hardwares())
def test_a_step_under_any_plan_keeps_the_order_that_its_data_needs(data, trace, machine):
    plan = data.draw(any_plans(trace))
    result = simulate_step(trace, plan, machine, timeline=True)
    result.check()
    check_step(with_libraries(trace, machine), plan, machine, result, op_times(trace, machine))


@given(st.data(), traces())
def test_requested_bytes_of_every_op_equal_a_count_by_sets(data, trace):
    plan = data.draw(any_plans(trace))
    assert requested(trace, resolve(plan, trace)) == requested_by_op(trace, plan)
    assert requested(trace) == requested_by_op(trace, None)


@given(st.data(), traces(), hardwares())
def test_the_same_step_gives_the_same_result_with_and_without_a_timeline(data, trace, machine):
    plan = data.draw(any_plans(trace))
    first, second = (simulate_step(trace, plan, machine, timeline=True) for _ in range(2))
    assert dumps(first) == dumps(second)
    assert replace(first, timeline=None) == simulate_step(trace, plan, machine)


@pytest.mark.parametrize("trace", CHAINS, ids=lambda t: t.model)
def test_the_policy_none_costs_what_no_plan_costs(trace):
    machine = hardware("titan-x")
    nothing, plan = simulate_step(trace, None, machine), decide("none", trace, machine)
    assert replace(simulate_step(trace, plan, machine), plan="") == nothing
    assert nothing.stall_ns == nothing.offloaded_bytes == nothing.host_peak_bytes == 0


@pytest.mark.parametrize("trace", CHAINS, ids=lambda t: t.model)
@pytest.mark.parametrize("rules", ["event", "paper"])
def test_policies_keep_the_order_too_and_take_no_less_than_compute(trace, rules):
    machine = hardware("titan-x")
    for policy in ("vdnn-all", "vdnn-conv"):
        plan = decide(policy, trace, machine, Options(rules=rules, min_bytes=0))
        result = simulate_step(trace, plan, machine, timeline=True)
        check_step(with_libraries(trace, machine), plan, machine, result, op_times(trace, machine))
        assert result.iteration_time_ns >= sum(op_times(trace, machine))


@pytest.mark.case(60)
@pytest.mark.parametrize("trace", CHAINS, ids=lambda t: t.model)
def test_a_faster_link_is_never_slower(trace):
    machine = hardware("titan-x")
    plan = decide("vdnn-all", trace, machine, Options(min_bytes=0))
    times = []
    for tenths in (1, 2, 5, 10, 20, 100):
        link = {
            name: getattr(machine, name) * tenths // 10
            for name in ("d2h_bytes_per_s", "h2d_bytes_per_s", "duplex_bytes_per_s")
        }
        times.append(simulate_step(trace, plan, replace(machine, **link)).iteration_time_ns)
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


def one_byte_a_ns(**changes: int) -> Hardware:
    """No launch cost, no latency, a byte a nanosecond each way."""
    numbers = {
        "memory_bytes": 10**6,
        "dram_bytes_per_s": 10**9,
        "d2h_bytes_per_s": 10**9,
        "h2d_bytes_per_s": 10**9,
        "duplex_bytes_per_s": 2 * 10**9,
        "link_latency_ns": 0,
        "launch_ns": 0,
        "kernel_ns": 0,
    }
    numbers.update(changes)
    return Hardware(id="hand", name="by hand", peaks=(Peak("float32", 10**9),), efficiencies=(), sources=(), **numbers)


def two_convolutions() -> tuple[Trace, Plan]:
    """conv0, conv1, loss forward (ops 0–2); loss, conv1's two, conv0's one backward (3–6).

    conv1's input is conv0's output, the only thing that is offloaded: out at conv1's pack (position 1),
    released when conv1 returns (2), fetched when the loss's backward begins (3), needed at 4.
    """
    trace = conv_chain_without_relu()
    machine = one_byte_a_ns()
    plan = decide("vdnn-conv", trace, machine, Options(min_bytes=0, keep_soon=False))
    entries = []
    for entry in plan.entries:
        if str(entry.saved[0]) == "conv1#0/0":
            entry = replace(entry, action=Offload("end conv1#0", "unpack <outside>#0/0"))
        elif isinstance(entry.action, Offload):
            continue
        entries.append(entry)
    return trace, replace(plan, entries=tuple(entries))


def conv_chain_without_relu() -> Trace:
    from vdnn.analysis.synthetic import Tape

    tape = Tape("two_convolutions", 1)
    x = tape.conv("conv0", tape.input(1, 1, 5, 5), 10)  # 1000 bytes out
    return tape.finish(tape.conv("conv1", x, 2), optimizer=False)


def test_a_step_worked_out_by_hand():
    """Every op takes 600 ns, the copy of 1000 bytes takes 1000 ns each way.

    compute: conv0 0–600 │ conv1 600–1200 │ wait for the copy out, 600–1600: stall 400 │ loss 1600–2200 │
             loss backward 2200–2800 │ wait for the copy back, 2200–3200: stall 400 │ three more, to 5000
    """
    trace, plan = two_convolutions()
    assert [op.phase for op in trace.ops] == ["forward"] * 3 + ["backward"] * 4
    moves = resolve(plan, trace)
    assert [(m.out[0], m.release[0], m.fetch[0], m.need[0]) for m in moves] == [(1, 2, 3, 4)]
    times = run(trace, moves, [600] * 7, one_byte_a_ns())
    assert (times.forward_ns, times.backward_ns, times.total_ns) == (2200, 2800, 5000)
    assert (times.stall_ns, times.launch_idle_ns) == (800, 0)


def test_a_step_that_waits_for_its_host():
    """As above, but the host needs 1000 ns an op and a copy, so compute and link are never the slow ones.

    The host has issued: conv0 at 1000, the copy out at 2000, conv1 at 3000, loss at 4000, the copy back at 5000,
    loss backward at 6000, three more at 7000, 8000, 9000. The last op runs 9000–9600. Copies: 2000–3000 and
    5000–6000, both over before compute gets to their waits. Compute idles 9600 − 7 · 600 = 5400.
    """
    trace, plan = two_convolutions()
    times = run(trace, resolve(plan, trace), [600] * 7, one_byte_a_ns(launch_ns=1000), host_ns=[1000] * 7)
    assert (times.total_ns, times.stall_ns, times.launch_idle_ns) == (9600, 0, 5400)


def test_on_demand_the_whole_copy_back_is_a_stall():
    trace, plan = two_convolutions()
    entries = tuple(
        replace(e, action=replace(e.action, prefetch_at="")) if isinstance(e.action, Offload) else e
        for e in plan.entries
    )
    result = simulate_step(trace, replace(plan, entries=entries), one_byte_a_ns(), timeline=True)
    assert [(s.cause, s.end_ns - s.start_ns) for s in result.timeline.stalls][-1] == ("fetch", 1000)


def test_fits_is_what_the_allocator_says_within_the_limit():
    """What is reserved without a limit is enough as a limit; less than what is allocated cannot be."""
    trace, machine = conv_chain(batch=512), hardware("titan-x")
    free = simulate_step(trace, None, machine)
    assert free.fits is True
    assert free.notes == ()
    assert free.peak_requested_bytes <= free.peak_allocated_bytes <= free.peak_reserved_bytes
    assert simulate_step(trace, None, machine, memory_limit=free.peak_reserved_bytes) == free
    tight = simulate_step(trace, None, machine, memory_limit=free.peak_reserved_bytes - 1)
    assert tight.fits is True
    assert tight.peak_reserved_bytes < free.peak_reserved_bytes
    assert "cached segments are given back" in tight.notes[0]
    result = simulate_step(trace, None, machine, memory_limit=free.peak_allocated_bytes - 1)
    assert result.fits is False
    assert result.notes[0].startswith("out of memory with 174.5 MiB: at max_pool2d_backward in pool3#0")
    assert replace(result, fits=True, notes=()) == free
    with pytest.raises(UsageError, match="memory limit of 0"):
        simulate_step(trace, None, machine, memory_limit=0)


def test_a_step_for_the_virtual_device_has_no_such_allocator():
    trace, machine = replace(conv_chain(), device="cpu"), hardware("titan-x")
    result = simulate_step(trace, None, machine)
    assert result.peak_allocated_bytes is result.peak_reserved_bytes is None
    assert "fits by requested bytes" in result.notes[0]
    assert simulate_step(trace, None, machine, memory_limit=result.peak_requested_bytes).fits is True
    assert simulate_step(trace, None, machine, memory_limit=result.peak_requested_bytes - 1).fits is False
