"""A step's memory through the allocator: what is allocated and reserved, and whether it fits.

    at each position   free what nobody holds any more
                       what the plan does: at a release the storage goes, at a fetch its new buffer is made
    at the op there    make its storages, in order, then its workspace; free the workspace

A fetched buffer is made on the compute stream, and a storage is released after compute has waited for its copy out; so
no block waits for another stream, and only program order decides. A buffer of one side stream for both ways is made on
that stream, from blocks of its own, and freed when that stream has waited for compute.

The step runs once, from an allocator that holds what was there before it. What an earlier step may have cached in
other places, and what CUDA itself takes, are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vdnn.errors import DeviceOutOfMemory
from vdnn.moments import Move, released_at
from vdnn.sim.allocator import AddressSpace, AllocatorOptions, CachingAllocator
from vdnn.sim.program import FETCH, RELEASE, actions
from vdnn.values.trace import Trace

__all__ = ["Script", "StepMemory", "step_memory"]

SIDE = 1  # the stream that a hook of torchtune makes its buffers on


@dataclass(frozen=True, slots=True)
class Script:
    """Allocations and frees in program order: `calls` holds k to make piece k, and ~k to free it.

    Pieces are the trace's storages, then a buffer for each move, then a workspace for each op. `positions` says
    where in the step each call is made; -1: before it.
    """

    sizes: list[int]
    calls: list[int]
    positions: list[int]
    streams: dict[int, int]

    @staticmethod
    def of(trace: Trace, moves: Sequence[Move]) -> Script:
        """The script of a step under a plan's moves."""
        n, storages = len(trace.ops), len(trace.storages)
        workspaces = storages + len(moves)
        sizes = [s.nbytes for s in trace.storages]
        sizes += [move.nbytes for move in moves]
        sizes += [op.workspace_bytes for op in trace.ops]
        release_of = released_at(moves)
        releases = dict.fromkeys(release_of, 0)
        for move in moves:
            if move.frees:
                releases[move.storage] += 1
        made: list[list[int]] = [[] for _ in range(n + 1)]
        gone: list[list[int]] = [[] for _ in range(n + 1)]
        acted: list[list[int]] = [[] for _ in range(n + 1)]
        calls: list[int] = []
        streams: dict[int, int] = {}
        for i, s in enumerate(trace.storages):
            end, by_action = s.free, False
            if i in release_of:
                end = min(max(release_of[i], s.release), s.free)
                by_action = end == release_of[i]
            if not s.nbytes or end <= max(s.alloc, 0):
                releases.pop(i, None)
                continue
            if s.alloc < 0:
                calls.append(i)
            else:
                made[s.alloc].append(i)
            if not by_action:
                gone[end].append(~i)
                releases.pop(i, None)
        for action in actions(moves):
            move = moves[action.move]
            if action.kind == RELEASE and move.storage in releases:
                releases[move.storage] -= 1
                if not releases[move.storage]:  # the storage goes with the last of its views
                    acted[action.position].append(~move.storage)
            elif action.kind == FETCH and move.nbytes and action.position < move.until:
                acted[action.position].append(storages + action.move)
                gone[move.until].append(~(storages + action.move))
                if move.lane == "side":
                    streams[storages + action.move] = SIDE
        gone[n].clear()  # that outlives the step
        positions = [-1] * len(calls)
        for p in range(n + 1):
            here = gone[p] + acted[p] + made[p]
            if p < n and trace.ops[p].workspace_bytes:
                here += (workspaces + p, ~(workspaces + p))
            calls += here
            positions += [p] * len(here)
        return Script(sizes, calls, positions, streams)


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What the allocator made of a step.

    Peaks are those of the run within the memory, if it fits; else of a run with unbounded memory. `retries` counts
    allocations that had to wait for cached segments to be given back; `failed_at` is the position (-1: before the
    step) at which memory ran out, and `failure` what was missing.
    """

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    fits: bool
    retries: int
    failed_at: int | None
    failure: str
    allocator: CachingAllocator


def step_memory(
    trace: Trace,
    moves: Sequence[Move],
    capacity: int,
    options: AllocatorOptions | None = None,
) -> StepMemory:
    """Run a step's allocations with `capacity` bytes as the limit; and without one, if they do not fit."""
    script = Script.of(trace, moves)
    allocator = CachingAllocator(AddressSpace(capacity), options)
    failed_at, failure = None, ""
    retries = 0
    failed = _play(script, allocator)
    if failed is not None:
        call, failure = failed
        failed_at = script.positions[call]
        allocator = CachingAllocator(AddressSpace(), options)
        _play(script, allocator)
    else:
        retries = allocator.num_alloc_retries
    total = allocator.total
    return StepMemory(
        total.allocated_bytes_peak, total.reserved_bytes_peak, failed is None, retries, failed_at, failure, allocator
    )


def _play(script: Script, allocator: CachingAllocator) -> tuple[int, str] | None:
    """Make every call; the number of the one that fails, and what the allocator says."""
    malloc, free, sizes, streams = allocator.malloc, allocator.free, script.sizes, script.streams
    addresses = [0] * len(sizes)
    made = 0
    try:
        for piece in script.calls:
            if piece >= 0:
                addresses[piece] = malloc(sizes[piece], streams.get(piece, 0))
            else:
                free(addresses[~piece])
            made += 1
    except DeviceOutOfMemory as error:
        return made, str(error)
    return None
