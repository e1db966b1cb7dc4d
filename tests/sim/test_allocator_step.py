"""A step's memory through the allocator, against the requested bytes that program order gives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.sim.oracle import requested_by_op
from tests.sim.test_simulator import any_plans
from tests.strategies import traces
from vdnn.analysis.moments import resolve
from vdnn.analysis.synthetic import conv_chain
from vdnn.sim.allocator import AllocatorOptions
from vdnn.sim.allocator_step import Script, fits, step_memory
from vdnn.values import Trace

MIB = 2**20


def live_after(script: Script) -> list[tuple[int, int]]:
    """(position, live bytes) after each call; a piece is made once and freed at most once, after it was made."""
    alive: set[int] = set()
    gone: set[int] = set()
    found = []
    for call, position in zip(script.calls, script.positions, strict=True):
        if call >= 0:
            assert call not in alive | gone
            alive.add(call)
        else:
            alive.remove(~call)
            gone.add(~call)
        found.append((position, sum(script.sizes[piece] for piece in alive)))
    return found


def check(trace: Trace, plan) -> None:
    moves = resolve(plan, trace)
    script = Script.of(trace, moves)
    found = live_after(script)
    expected = requested_by_op(trace, plan)
    # the most of each position is what is live during its op: what the plan and the op make come after what is freed
    for i, nbytes in enumerate(expected):
        before = [live for position, live in found if position < i]
        here = [live for position, live in found if position == i]
        assert max([before[-1] if before and not here else 0, *here], default=0) >= nbytes
        assert max([before[-1] if before else 0, *here], default=0) <= max(nbytes, expected[i - 1] if i else 1 << 62)
    memory = step_memory(trace, moves, 1 << 50)
    total = memory.allocator.total
    resident = sum(s.nbytes for s in trace.storages if s.alloc < 0 and s.free > 0)
    assert total.requested_bytes_peak == max([resident, *expected])
    assert total.requested_bytes_peak <= memory.peak_allocated_bytes <= memory.peak_reserved_bytes
    assert memory.fits
    assert memory.retries == 0


@given(st.data(), traces())
def test_the_step_that_the_allocator_sees_has_the_requested_bytes_of_every_op(data, trace):
    check(trace, data.draw(any_plans(trace)))
    check(trace, None)


@given(st.data(), traces(), st.integers(1, 64))
def test_within_a_limit_no_more_is_reserved_than_the_limit(data, trace, mib):
    moves = resolve(data.draw(any_plans(trace)), trace)
    free = step_memory(trace, moves, 1 << 50)
    tight = step_memory(trace, moves, mib * MIB)
    assert fits(trace, moves, mib * MIB) is tight.fits
    if tight.fits:
        assert tight.peak_reserved_bytes <= mib * MIB
    else:
        assert tight.failure
        assert (tight.peak_allocated_bytes, tight.peak_reserved_bytes) == (
            free.peak_allocated_bytes,
            free.peak_reserved_bytes,
        )
        assert mib * MIB < free.peak_reserved_bytes


def test_what_it_says_of_a_step_that_does_not_fit():
    trace = conv_chain(batch=512)
    nothing = step_memory(trace, (), 1 * MIB)
    assert (nothing.fits, nothing.failed_at) == (False, -1)
    half = step_memory(trace, (), 80 * MIB)
    assert half.failed_at is not None
    assert trace.ops[half.failed_at].phase == "forward"
    assert "80.0 MiB in all" in half.failure


def test_expandable_segments_reserve_less():
    trace = conv_chain(batch=512)
    plain = step_memory(trace, (), 1 << 40)
    expandable = step_memory(trace, (), 1 << 40, AllocatorOptions(expandable_segments=True))
    assert expandable.peak_allocated_bytes == plain.peak_allocated_bytes
    assert expandable.peak_reserved_bytes < plain.peak_reserved_bytes
