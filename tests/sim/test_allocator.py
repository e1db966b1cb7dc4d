"""The model of the CUDA caching allocator, against an oracle and against histories worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sim.allocator_oracle import Oracle, OutOfMemory
from vdnn.errors import DeviceOutOfMemory, FormatError, UsageError
from vdnn.sim.allocator import AddressSpace, AllocatorOptions, CachingAllocator, parse_settings

KIB, MIB = 2**10, 2**20
STATES = ("free", "allocated", "awaiting")


def layout(allocator: CachingAllocator) -> list[list[tuple[int, int, str, int]]]:
    """Every segment: its blocks as (address, size, state, requested)."""
    return [
        [(b.addr, b.size, STATES[b.state], b.requested if b.state else 0) for b in segment]
        for segment in allocator.segments()
    ]


# -- against the oracle ----------------------------------------------------------------------------

SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(1, 2 * MIB),
    st.integers(1, 30 * MIB),
    # at the edges of the rules
    st.sampled_from(
        [1, 511, 512, 513, MIB - 1, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 10 * MIB + 1, 20 * MIB, 21 * MIB]
    ),
)
STREAMS = st.integers(0, 2)
CALLS = st.one_of(
    st.tuples(st.just("malloc"), SIZES, STREAMS),
    st.tuples(st.just("malloc"), SIZES, st.just(0)),
    st.tuples(st.just("free"), st.integers(0, 99), st.just(0)),
    st.tuples(st.just("free"), st.integers(0, 99), st.just(0)),
    st.tuples(st.just("use"), st.integers(0, 99), STREAMS),
    st.tuples(st.just("finish"), st.just(0), STREAMS),
    st.tuples(st.just("empty"), st.just(0), st.just(0)),
)
DIVISIONS = st.sampled_from([0, 1, 2, 4, 8, 64])


@st.composite
def option_values(draw: st.DrawFn) -> AllocatorOptions:
    """Any options, plain ones often."""
    oldest = draw(st.booleans())
    if draw(st.booleans()):
        return AllocatorOptions(oldest_segment_first=oldest)
    segment = draw(st.sampled_from([20 * MIB, 32 * MIB]))
    options = AllocatorOptions(
        max_split_bytes=draw(st.sampled_from([None, segment, 34 * MIB, 64 * MIB])),
        max_non_split_rounding_bytes=draw(st.sampled_from([20 * MIB, 30 * MIB])),
        large_segment_bytes=segment,
        roundup_divisions=tuple(draw(st.lists(DIVISIONS, min_size=16, max_size=16))),
        garbage_collection_threshold=draw(st.sampled_from([0.0, 0.0, 0.25, 0.7])),
        expandable_segments=draw(st.booleans()),
        oldest_segment_first=oldest,
    )
    options.check()
    return options


def play(calls, options, capacity, allowed, kind=CachingAllocator):
    """The same calls to the model and to the oracle; after each, everything must be equal."""
    model = kind(AddressSpace(capacity), options, allowed_bytes=allowed)
    model.history = []
    oracle = Oracle(AddressSpace(capacity), options, allowed)
    alive: list[int] = []
    for call, number, stream in calls:
        if call == "malloc":
            try:
                expected = oracle.malloc(number, stream)
            except OutOfMemory:
                with pytest.raises(DeviceOutOfMemory):
                    model.malloc(number, stream)
            else:
                assert model.malloc(number, stream) == expected
                alive.append(expected)
        elif call in ("free", "use") and alive:
            i = number % len(alive)
            if call == "free":
                addr = alive.pop(i)
                oracle.free(addr)
                model.free(addr)
            else:
                oracle.record_stream(alive[i], stream)
                model.record_stream(alive[i], stream)
        elif call == "finish":
            oracle.finish(stream)
            model.finish(stream)
        elif call == "empty":
            oracle.empty_cache()
            model.empty_cache()
        assert [event[:4] for event in model.history] == oracle.history
        assert layout(model) == oracle.layout()
        statistics = model.statistics()
        assert {name: statistics[name] for name in oracle.numbers} == oracle.numbers
        assert (model.num_alloc_retries, model.num_ooms) == (oracle.retries, oracle.ooms)
    return model


@settings(max_examples=250)
@given(
    st.lists(CALLS, max_size=60),
    option_values(),
    st.sampled_from([None, 24 * MIB, 50 * MIB, 84 * MIB, 200 * MIB]),
    st.sampled_from([None, 60 * MIB, 120 * MIB]),
)
def test_every_event_block_and_statistic_is_the_oracles(calls, options, capacity, allowed):
    play(calls, options, capacity, allowed)


@settings(max_examples=60)
@given(st.lists(CALLS, max_size=60), option_values(), st.sampled_from([None, 50 * MIB, 200 * MIB]))
def test_live_blocks_never_overlap_and_what_is_freed_can_be_given_back(calls, options, capacity):
    """Without an oracle: what any allocator must keep."""
    allocator = CachingAllocator(AddressSpace(capacity), options)
    live: dict[int, int] = {}
    for call, number, stream in calls:
        if call == "malloc":
            try:
                addr = allocator.malloc(number, stream)
            except DeviceOutOfMemory:
                continue
            assert all(addr + number <= other or other + size <= addr for other, size in live.items())
            live[addr] = number
        elif call == "free" and live:
            addr = sorted(live)[number % len(live)]
            allocator.free(addr)
            del live[addr]
        assert allocator.total.requested_bytes == sum(live.values())
        assert capacity is None or allocator.total.reserved_bytes <= capacity
    for addr in live:
        allocator.free(addr)
    allocator.empty_cache()
    assert allocator.segments() == []
    assert (allocator.total.reserved_bytes, allocator.driver.free_bytes()) == (0, allocator.driver.total_bytes())


def test_the_oracle_notices_a_wrong_rule():
    """A model that leaves no tails in large blocks, or that takes any block that fits, is not taken for right."""

    class NoTails(CachingAllocator):
        def place(self, block, rounded, size):
            self._expandable = True
            return super().place(block, rounded, size)

    class WorstFit(CachingAllocator):
        def grow(self, shelf, rounded):
            self._plain_search = False
            return super().grow(shelf, rounded)

        def fitting(self, shelf, rounded):
            found = [b for b in shelf.free_blocks() if b.size >= rounded]
            return found[-1] if found else None

    tail = [("malloc", 19 * MIB + 512 * KIB, 0)]
    holes = [("malloc", n * MIB, 0) for n in (2, 2, 4)] + [("free", 0, 0), ("malloc", 2 * MIB, 0)]
    for kind, calls in ((NoTails, tail), (WorstFit, holes)):
        play(calls, AllocatorOptions(), None, None)
        with pytest.raises(AssertionError):
            play(calls, AllocatorOptions(), None, None, kind)


# -- by hand ---------------------------------------------------------------------------------------


def fresh(capacity=None, settings="", **more):
    allocator = CachingAllocator(AddressSpace(capacity), parse_settings(settings), **more)
    allocator.history = []
    return allocator


def test_the_small_pool_by_hand():
    """1 byte takes 512, 513 take 1024, both from the front of one segment of 2 MiB; the rest stays one free block.

    Freeing the first leaves two free blocks, apart: 512 and 2 MiB − 1536. A third request of 512 takes the hole.
    """
    a = fresh()
    first = a.malloc(1)
    second = a.malloc(513)
    assert second - first == 512
    assert (a.total.allocated_bytes, a.total.requested_bytes, a.total.reserved_bytes) == (1536, 514, 2 * MIB)
    assert (a.total.inactive_split, a.total.inactive_split_bytes) == (1, 2 * MIB - 1536)
    a.free(first)
    assert (a.total.inactive_split, a.total.inactive_split_bytes) == (2, 2 * MIB - 1024)
    assert a.malloc(512) == first
    a.free(first)
    a.free(second)
    assert (a.total.inactive_split, a.total.inactive_split_bytes, a.total.inactive_split_peak) == (0, 0, 2)
    assert [e[0] for e in a.history].count("segment_alloc") == 1


def test_the_large_pool_by_hand():
    """6 MiB come from a segment of 20 MiB: 14 are left, split off. 12.5 MiB fit there and leave 1.5, more than 1 MiB.

    19.5 MiB are more than what is left and at least 10 MiB: a segment to measure, rounded to 20 MiB. What is left,
    0.5 MiB, is not more than 1 MiB and stays in the block as its tail: allocated counts it, requested does not.
    """
    a = fresh()
    six = a.malloc(6 * MIB)
    assert a.malloc(12 * MIB + 512 * KIB) == six + 6 * MIB
    assert a.total.inactive_split_bytes == 1536 * KIB
    a.malloc(19 * MIB + 512 * KIB)
    assert [(e[0], e[2]) for e in a.history if e[0] == "segment_alloc"] == [
        ("segment_alloc", 20 * MIB),
        ("segment_alloc", 20 * MIB),
    ]
    assert a.total.allocated_bytes == (6 + 20) * MIB + 12 * MIB + 512 * KIB
    assert a.total.requested_bytes == 38 * MIB


def test_the_best_fit_is_the_smallest_and_in_one_segment_the_lowest():
    """Holes of 4, 3 and 3 MiB, each between blocks that stay: 2 MiB + 512 go into the first hole of 3 MiB.

    What is left of it, 1 MiB − 512, is not more than 1 MiB: the whole hole is taken.
    """
    a = fresh()
    blocks = [a.malloc(size * MIB) for size in (4, 2, 3, 2, 3, 2)]
    for i in (4, 2, 0):
        a.free(blocks[i])
    assert a.malloc(2 * MIB + 512) == blocks[2]
    assert a.total.allocated_bytes == (3 + 2 + 2 + 2) * MIB


def test_of_equal_blocks_that_in_the_oldest_segment_is_taken():
    """A and B are segments of 12 MiB. A is given back and made anew at its old address, so it is the younger and lower.

    With both free, 12 MiB go to B.
    """
    a = fresh()
    first, second = a.malloc(12 * MIB), a.malloc(12 * MIB)
    a.free(first)
    a.empty_cache()
    assert a.malloc(12 * MIB) == first
    a.free(first)
    a.free(second)
    assert first < second
    assert a.malloc(12 * MIB) == second


def test_a_block_does_not_change_streams():
    a = fresh()
    first = a.malloc(5 * MIB, stream=1)
    a.free(first)
    assert a.malloc(5 * MIB, stream=2) != first
    assert a.malloc(5 * MIB, stream=1) == first
    assert a.total.reserved_bytes == 40 * MIB


def test_a_block_used_by_another_stream_waits_for_it():
    """Freed, it is still active and requested, no longer allocated. It comes back at the first malloc after the end."""
    a = fresh()
    block = a.malloc(30 * MIB)
    a.record_stream(block, 7)
    a.record_stream(block, 0)  # its own stream counts for nothing
    a.free(block)
    assert (a.total.allocated_bytes, a.total.active_bytes, a.total.requested_bytes) == (0, 30 * MIB, 30 * MIB)
    other = a.malloc(30 * MIB)
    assert other != block
    assert a.total.active_bytes_peak == 60 * MIB
    assert a.total.allocated_bytes_peak == 30 * MIB
    a.finish(7)
    assert a.total.active_bytes == 60 * MIB
    assert a.malloc(30 * MIB) == block
    assert [e[0] for e in a.history][-2:] == ["free_completed", "alloc"]


def test_out_of_memory_gives_cached_segments_back_and_tries_again():
    """Of 50 MiB, 20 (cached) and 20 (in use) are taken. 24 more do not fit: the cached 20 go, 30 are free.

    Then 40 do not fit whatever is given back: out of memory, and nothing that is in use has changed.
    """
    a = fresh(50 * MIB)
    cached, used = a.malloc(20 * MIB), a.malloc(20 * MIB)
    a.free(cached)
    a.malloc(24 * MIB)
    assert [e[:1] + e[2:3] for e in a.history[-3:]] == [
        ("segment_free", 20 * MIB),
        ("segment_alloc", 24 * MIB),
        ("alloc", 24 * MIB),
    ]
    assert (a.num_alloc_retries, a.num_ooms) == (1, 0)
    with pytest.raises(DeviceOutOfMemory, match=r"40\.0 MiB: 50\.0 MiB in all, 6\.0 MiB free, 44\.0 MiB allocated"):
        a.malloc(40 * MIB)
    assert (a.num_alloc_retries, a.num_ooms) == (2, 1)
    a.free(used)


def test_a_segment_with_one_live_block_stays():
    """Fragmentation: 24 of 40 MiB are free, in two segments of which each holds a block. 22 MiB find no place."""
    a = fresh(40 * MIB)
    blocks = [a.malloc(n * MIB) for n in (8, 12, 8, 12)]
    a.free(blocks[1])
    a.free(blocks[3])
    with pytest.raises(DeviceOutOfMemory):
        a.malloc(22 * MIB)
    assert a.total.reserved_bytes == 40 * MIB


def test_max_split_size_by_hand():
    """Blocks of 64 MiB or more are not split, and not used for less: 100 MiB cached serve 90 and not 60, nor 80.

    80 MiB: the block would be more than 20 MiB too large. Out of memory for 30 more: the cached 100 alone go.
    """
    a = fresh(230 * MIB, "max_split_size_mb:64")
    big = a.malloc(100 * MIB)
    a.free(big)
    assert a.malloc(90 * MIB) == big
    assert a.total.allocated_bytes == 100 * MIB
    assert a.oversize_allocations == 1
    a.free(big)
    assert a.malloc(60 * MIB) != big
    assert a.malloc(60 * MIB) != big
    a.malloc(80 * MIB)
    assert [e[:3] for e in a.history if e[0] == "segment_free"] == [("segment_free", big, 100 * MIB)]
    assert a.num_alloc_retries == 0


@pytest.mark.parametrize(
    ("size", "rounded"),
    [(1, 512), (2048, 2048), (2049, 2560), (1200 * KIB, 1280 * KIB), (1025 * KIB, 1280 * KIB), (16 * MIB, 16 * MIB)],
)
def test_four_divisions_between_powers_of_two(size, rounded):
    """Between 1024 and 2048 KiB: 1024, 1280, 1536, 1792. Up to 4 · 512 bytes: multiples of 512 as always."""
    assert parse_settings("roundup_power2_divisions:4").rounded(size) == rounded


def test_divisions_by_interval():
    """Below 256 MiB as at 256, at 512 two, above 1024 what ">" says."""
    steps = parse_settings("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]").roundup_divisions
    assert steps == (1,) * 9 + (2, 4) + (8,) * 5


def test_garbage_collection_by_hand():
    """Allowed 100 MiB, threshold 0.5. A (20) and B (24) are cached, both from the first searches; C (20) is in use.

    64 > 50: at the next new segment what is as old as the average or older goes. A was freed after 3 searches of
    the large pool, B after 3; the new request is the 4th: ages 1 and 1, the average is 1, both go.
    """
    a = fresh(None, "garbage_collection_threshold:0.5", allowed_bytes=100 * MIB)
    first, second, _ = a.malloc(20 * MIB), a.malloc(24 * MIB), a.malloc(20 * MIB)
    a.free(first)
    a.free(second)
    a.malloc(30 * MIB)
    assert [e[2] for e in a.history if e[0] == "segment_free"] == [20 * MIB, 24 * MIB]
    assert a.total.reserved_bytes == 50 * MIB
    assert a.num_alloc_retries == 0


def test_expandable_segments_by_hand():
    """Pages of 20 MiB: 15 MiB map one; 12 more need 27, a second page is mapped right behind. Then 13 are left.

    After the first is freed, 30 MiB do not fit between: the end grows by one page, 13 + 20 ≥ 30. Emptying the cache
    frees 15 MiB (less than a page) and 3 at the end: nothing, until the second is gone as well: one page, the first.
    """
    a = fresh(None, "expandable_segments:True")
    first = a.malloc(15 * MIB)
    second = a.malloc(12 * MIB)
    assert second == first + 15 * MIB
    a.free(first)
    third = a.malloc(30 * MIB)
    assert third == second + 12 * MIB
    assert [(e[0], e[1] - first, e[2]) for e in a.history if e[0].startswith("segment")] == [
        ("segment_map", 0, 20 * MIB),
        ("segment_map", 20 * MIB, 20 * MIB),
        ("segment_map", 40 * MIB, 20 * MIB),
    ]
    a.empty_cache()
    assert a.total.reserved_bytes == 60 * MIB
    a.free(second)
    a.empty_cache()
    assert a.history[-1][:3] == ("segment_unmap", first, 20 * MIB)
    assert a.total.reserved_bytes == 40 * MIB
    assert a.malloc(10 * MIB) == first + 20 * MIB - 20 * MIB


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("max_split_size_mb:10", "at least 20 MiB"),
        ("backend:cudaMallocAsync", "cudaMallocAsync is another allocator"),
        ("roundup_power2_divisions:3", "not a power of two"),
        ("roundup_power2_divisions:[3:2]", "no value"),
        ("expandable_segments:yes", "no value"),
        ("garbage_collection_threshold:1.5", "between 0 and 1"),
        ("max_split_size_mb=128", "key:value"),
        ("speed:11", "not a setting"),
        ("large_segment_size_mb:4", "more than 10 MiB"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(FormatError, match=message):
        parse_settings(settings)


def test_settings_as_torch_writes_them():
    text = "max_split_size_mb:40, max_non_split_rounding_mb:30,pinned_use_background_threads:True,backend:native"
    assert dataclasses.asdict(parse_settings(text)) == dataclasses.asdict(
        AllocatorOptions(max_split_bytes=40 * MIB, max_non_split_rounding_bytes=30 * MIB)
    )
    assert parse_settings("") == AllocatorOptions()


def test_wrong_calls_are_errors():
    a = fresh()
    with pytest.raises(UsageError, match="0 bytes"):
        a.malloc(0)
    addr = a.malloc(10)
    a.free(addr)
    with pytest.raises(UsageError, match="freed before"):
        a.free(addr)
    with pytest.raises(UsageError, match="before the block is freed"):
        a.record_stream(addr, 1)
