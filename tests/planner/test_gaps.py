"""The parts of a gap sum to it, and each is where it belongs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vdnn.analysis.synthetic import conv_chain
from vdnn.costs import times_with
from vdnn.planner import GapParts, Planned, best_plan, gap_parts, least_plan, time_bound
from vdnn.policies import Options, decide
from vdnn.sim import simulate_step
from vdnn.values import Hardware, Trace, hardware

TRACE = conv_chain(batch=512, channels=(16, 32) * 6)
BARE = replace(hardware("rtx4090"), launch_ns=0, kernel_ns=0, link_latency_ns=0)
FAST = replace(BARE, d2h_bytes_per_s=10**14, h2d_bytes_per_s=10**14, duplex_bytes_per_s=2 * 10**14)


def planned(trace: Trace, machine: Hardware, policy: str, window: int | None = None) -> Planned:
    """A policy's plan as the planner would return it at the peak that it requests."""
    plan = decide(policy, trace, machine, Options(min_bytes=1, window_bytes=window))
    result = simulate_step(trace, plan, machine)
    bound = time_bound(trace, machine, times_with(trace, machine, {}, ""), result.peak_requested_bytes or 1)
    return Planned(trace, plan, result, bound, simulate_step(trace, None, machine))


def shares(parts: GapParts) -> tuple[int, int, int, int]:
    return parts.fragments_ns, parts.again_ns, parts.storages_ns, parts.copies_ns


@pytest.mark.parametrize("policy", ["vdnn-all", "vdnn-conv", "recompute", "recompute-offload", "encode-offload"])
@pytest.mark.parametrize("machine", [BARE, FAST, hardware("rtx4090")], ids=["bare", "fast", "rtx4090"])
def test_the_parts_are_a_split_of_the_gap(policy: str, machine: Hardware) -> None:
    found = planned(TRACE, machine, policy)
    parts = gap_parts(found, TRACE, machine)
    assert min(shares(parts)) >= 0
    assert parts.total_ns == (found.result.iteration_time_ns or 0) - found.bound.time_ns


def test_what_is_computed_again_is_a_part_of_its_own() -> None:
    parts = gap_parts(planned(TRACE, FAST, "recompute"), TRACE, FAST)
    assert parts.again_ns > 0.99 * parts.total_ns > 0


def test_copies_that_are_waited_for_are_a_part_of_their_own() -> None:
    """Fetched on demand, each storage is waited for; with as much memory they could come earlier."""
    found = planned(TRACE, BARE, "vdnn-all", window=0)
    parts = gap_parts(found, TRACE, BARE)
    assert parts.copies_ns == parts.total_ns == found.result.stall_ns
    assert parts.copies_ns > 0


def test_a_budget_beyond_what_is_requested_is_the_allocators() -> None:
    trace = replace(TRACE, device="cuda")
    machine = hardware("rtx4090")
    found = best_plan(
        trace, machine, (least_plan(trace, machine).plan.budget_bytes or 0) * 5 // 4, Options(min_bytes=1)
    )
    parts = gap_parts(found, trace, machine)
    assert parts.total_ns == (found.result.iteration_time_ns or 0) - found.bound.time_ns
    wide = replace(found, bound=time_bound(trace, machine, times_with(trace, machine, {}, ""), 1 << 60))
    assert gap_parts(wide, trace, machine).fragments_ns >= parts.fragments_ns + found.bound.time_ns - wide.bound.time_ns
