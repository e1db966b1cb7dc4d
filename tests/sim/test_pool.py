"""The pool that vDNN's memory came from: best fit, one piece, nothing given back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdnn.analysis.synthetic import conv_chain
from vdnn.analysis.torch7 import as_torch7
from vdnn.errors import DeviceOutOfMemory
from vdnn.sim.pool import Pool, run_pool

K = 1024


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    pool = Pool(100 * K)
    a, _, c, _ = [pool.malloc(size * K) for size in (20, 10, 10, 10)]
    pool.free(a)  # 20 KiB free at 0
    pool.free(c)  # 10 KiB free at 30 KiB
    assert pool.malloc(8 * K) == c
    assert pool.malloc(12 * K) == a


def test_free_neighbours_become_one_block() -> None:
    pool = Pool(30 * K)
    blocks = [pool.malloc(10 * K) for _ in range(3)]
    for block in (blocks[0], blocks[2], blocks[1]):
        pool.free(block)
    assert pool.malloc(30 * K) == 0


def test_memory_in_pieces_is_out_of_memory_and_says_so() -> None:
    pool = Pool(30 * K)
    blocks = [pool.malloc(10 * K) for _ in range(3)]
    pool.free(blocks[0])
    pool.free(blocks[2])
    with pytest.raises(DeviceOutOfMemory, match=r"20\.0 KiB are free, 10\.0 KiB in one piece"):
        pool.malloc(20 * K)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5000)), max_size=60))
def test_blocks_never_overlap_and_everything_comes_back(calls: list[tuple[bool, int]]) -> None:
    pool = Pool(64 * K)
    live: dict[int, int] = {}
    for make, size in calls:
        if make:
            try:
                address = pool.malloc(size)
            except DeviceOutOfMemory:
                continue
            assert address % 512 == 0
            assert address + size <= pool.capacity
            assert all(address + size <= a or a + s <= address for a, s in live.items())
            live[address] = size
        elif live:
            address = sorted(live)[size % len(live)]
            del live[address]
            pool.free(address)
    for address in list(live):
        pool.free(address)
    assert pool.used_bytes == 0
    assert pool.malloc(pool.capacity) == 0


def test_a_step_holds_at_most_its_live_bytes_and_their_rounding() -> None:
    from vdnn.analysis.liveness import peak

    trace = as_torch7(conv_chain())
    most = peak(trace).nbytes
    done = run_pool(trace, (), 2 * most)
    assert done.failed_at is None
    assert most <= done.peak_bytes <= most + 512 * len(trace.storages)
    assert run_pool(trace, (), most // 2).failed_at is not None
