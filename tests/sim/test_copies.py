"""The link and its two streams, by hand."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.sim.test_simulator import one_byte_a_ns
from vdnn.sim.copies import BACK, OUT_WAY, CopyStreams


def test_both_ways_at_once_share_the_link():
    """A byte a ns each way, and a byte a ns together.

    Out alone 0–500: 500 of 1000 bytes. Both at half rate: out's other 500 bytes take 1000 ns, to 1500. By then
    back has 500 of its 1000; alone again, it ends at 2000.
    """
    copies = CopyStreams(one_byte_a_ns(duplex_bytes_per_s=10**9), 2)
    copies.submit(0, OUT_WAY, 1000, 0)
    copies.submit(1, BACK, 1000, 500)
    assert copies.drain() == 2000
    assert (copies.start, copies.end) == ([0, 500], [1500, 2000])


def test_a_full_duplex_link_slows_nobody():
    copies = CopyStreams(one_byte_a_ns(), 2)
    copies.submit(0, OUT_WAY, 1000, 0)
    copies.submit(1, BACK, 1000, 500)
    copies.drain()
    assert copies.end == [1000, 1500]


def test_latency_comes_before_every_copy_and_does_not_use_the_link():
    """Out: latency 0–100, bytes 100–1100. Back: latency 1000–1100, bytes from 1100: they never share."""
    copies = CopyStreams(one_byte_a_ns(link_latency_ns=100, duplex_bytes_per_s=10**9), 2)
    copies.submit(0, OUT_WAY, 1000, 0)
    copies.submit(1, BACK, 50, 1000)
    copies.drain()
    assert copies.end == [1100, 1150]


def test_a_copy_back_waits_for_its_own_copy_out_and_blocks_its_stream():
    copies = CopyStreams(one_byte_a_ns(), 3)
    copies.submit(0, OUT_WAY, 1000, 0)
    copies.submit(1, BACK, 10, 0, after=0)
    copies.submit(2, BACK, 10, 0)
    assert copies.end_of(2) == 1020
    assert copies.start == [0, 1000, 1010]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 5000), st.integers(0, 5000)), min_size=1, max_size=12),
    st.integers(1, 10),
)
def test_asking_early_for_one_end_changes_no_other(plans, tenths):
    """`end_of` runs the clock only as far as it must; later submissions must not find it ahead of them."""
    machine = replace(one_byte_a_ns(link_latency_ns=7), duplex_bytes_per_s=10**8 * (10 + tenths))
    ways = [BACK if back else OUT_WAY for back, _, _ in plans]
    lazy, eager = CopyStreams(machine, len(plans)), CopyStreams(machine, len(plans))
    ready, readies = 0, []
    for i, (way, (_, nbytes, wait)) in enumerate(zip(ways, plans, strict=True)):
        ready += wait
        readies.append(ready)
        eager.submit(i, way, nbytes, ready)
        if wait % 3 == 0:
            ready = max(ready, eager.end_of(i))  # compute waits for it, and goes on from there
    for i, (way, (_, nbytes, _)) in enumerate(zip(ways, plans, strict=True)):
        lazy.submit(i, way, nbytes, readies[i])
    assert eager.drain() == lazy.drain()
    assert eager.end == lazy.end
