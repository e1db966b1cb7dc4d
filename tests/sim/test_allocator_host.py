"""The pinned-host allocator: by hand, and against a list that is searched from its end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdnn.errors import UsageError
from vdnn.sim.host_allocator import HostAllocator

MIB = 2**20


def test_a_request_takes_the_next_power_of_two():
    host = HostAllocator()
    sizes = {1: 1, 2: 2, 3: 4, 4096: 4096, 4097: 8192, 5 * MIB: 8 * MIB, 8 * MIB: 8 * MIB}
    assert {size: host.rounded(size) for size in sizes} == sizes
    for size in sizes:
        host.allocate(size)
    assert host.statistics.allocated_bytes == host.active_bytes == sum(sizes.values())


def test_a_freed_block_serves_its_bucket_only_and_the_last_one_first():
    """5 and 6 MiB take 8 MiB each. Both freed, 7 MiB get the one freed last, 3 MiB a new one of 4."""
    host = HostAllocator()
    first, second = host.allocate(5 * MIB), host.allocate(6 * MIB)
    host.free(first)
    host.free(second)
    assert host.allocate(7 * MIB) == second
    assert host.allocate(3 * MIB) not in (first, second)
    assert host.statistics.allocated_bytes == 20 * MIB
    assert host.active_bytes == 12 * MIB
    assert host.statistics.num_host_alloc == 3


def test_a_block_waits_for_the_stream_that_copies_and_blocks_later_events():
    """Events are looked at oldest first: B's stream is done, but A's event is before it and is not."""
    host = HostAllocator()
    a, b = host.allocate(4096), host.allocate(4096)
    host.record_event(a, 1)
    host.record_event(b, 2)
    host.free(a)
    host.free(b)
    host.finish(2)
    third = host.allocate(4096)
    assert third not in (a, b)
    host.finish(1)
    assert host.allocate(4096) == b
    assert host.allocate(4096) == a
    assert host.active_bytes == 3 * 4096


def test_above_the_thresholds_nothing_is_rounded_and_nothing_is_kept():
    host = HostAllocator(max_round_bytes=4 * MIB, max_cached_bytes=16 * MIB)
    assert (host.rounded(3 * MIB), host.rounded(5 * MIB)) == (4 * MIB, 5 * MIB)
    five, twenty = host.allocate(5 * MIB), host.allocate(20 * MIB)
    host.free(five)
    host.free(twenty)
    assert host.statistics.allocated_bytes == 5 * MIB
    assert host.allocate(6 * MIB) != five  # of the same bucket, and too small
    assert host.allocate(5 * MIB - 1) == five
    host.empty_cache()
    assert host.statistics.allocated_bytes == 11 * MIB


def test_wrong_calls_are_errors():
    host = HostAllocator()
    with pytest.raises(UsageError, match="0 bytes"):
        host.allocate(0)
    with pytest.raises(UsageError, match="freed before"):
        host.free(1)
    with pytest.raises(UsageError, match="is negative"):
        HostAllocator(max_round_bytes=-1)


CALLS = st.one_of(
    st.tuples(st.just("allocate"), st.integers(1, 40_000)),
    st.tuples(st.just("free"), st.integers(0, 20)),
    st.tuples(st.just("use"), st.integers(0, 60)),
    st.tuples(st.just("finish"), st.integers(0, 2)),
    st.tuples(st.just("empty"), st.just(0)),
)


@settings(max_examples=200)
@given(st.lists(CALLS, max_size=60), st.sampled_from([None, 1000, 10_000]), st.sampled_from([None, 2000, 20_000]))
def test_against_a_plain_list(calls, round_most, cached_most):
    """The oracle: all blocks in one list in the order they became free, and a list of events with a flag each."""
    host = HostAllocator(max_round_bytes=round_most, max_cached_bytes=cached_most)
    size_of: dict[int, int] = {}
    free: list[int] = []
    uses: dict[int, list[int]] = {}
    events: list[list] = []  # stream, block, done
    live: list[int] = []

    def power(size: int) -> int:
        two = 1
        while two < size:
            two *= 2
        return two

    def cache(addr: int) -> None:
        if cached_most is not None and size_of[addr] > cached_most:
            del size_of[addr]
        else:
            free.append(addr)

    def poll() -> None:
        while events and events[0][2]:
            addr = events.pop(0)[1]
            if all(event[1] != addr for event in events):
                cache(addr)

    for call, number in calls:
        if call == "allocate":
            poll()
            limits = [limit for limit in (round_most, cached_most) if limit is not None]
            wanted = power(number) if all(number <= limit for limit in limits) else number
            fitting = [a for a in free if power(size_of[a]) == power(wanted) and size_of[a] >= wanted]
            addr = host.allocate(number)
            if fitting:
                assert addr == fitting[-1]
                free.remove(addr)
            else:
                assert addr not in size_of
                size_of[addr] = wanted
            live.append(addr)
            uses[addr] = []
        elif call == "free" and live:
            addr = live.pop(number % len(live))
            host.free(addr)
            for stream in uses[addr]:
                events.append([stream, addr, False])
            if not uses[addr]:
                cache(addr)
        elif call == "use" and live:
            addr, stream = live[number % len(live)], number % 3
            host.record_event(addr, stream)
            uses[addr] += [stream] if stream not in uses[addr] else []
        elif call == "finish":
            host.finish(number)
            for event in events:
                event[2] = event[2] or event[0] == number
        elif call == "empty":
            host.empty_cache()
            poll()
            for addr in free:
                del size_of[addr]
            free.clear()
        assert host.statistics.allocated_bytes == sum(size_of.values())
        assert host.active_bytes == sum(size for addr, size in size_of.items() if addr not in free)
        assert host.statistics.allocations == len(size_of)
        spans = sorted((addr, addr + size) for addr, size in size_of.items())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
