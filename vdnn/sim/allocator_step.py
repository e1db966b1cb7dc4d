"""A step's memory through the allocator: what is allocated and reserved, and whether it fits.

    at each position   free what nobody holds any more
                       what the plan does: at a release the storage goes, at a fetch its new buffer is made
    at the op there    make its storages, in order, then its workspace; free the workspace

A fetched buffer is made on the compute stream, and a storage is released after compute has waited for its copy out; so
no block waits for another stream, and only program order decides. A buffer of one side stream for both ways is made on
that stream, from blocks of its own, and freed when that stream has waited for compute.

A training's first step runs, then one more (vdnn.sim.first_step): the second finds the segments, and the holes, that
the first one left. What CUDA itself takes is not in it: it is not torch's allocator's.

A convolution's workspace that cannot be had is done without: cuDNN takes its next algorithm, which needs less. Other
ops have no other way: their workspaces are copies that their kernels read from.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from vdnn.analysis.moments import Move, released_at
from vdnn.errors import DeviceOutOfMemory
from vdnn.sim.allocator import AddressSpace, AllocatorOptions, CachingAllocator
from vdnn.sim.first_step import first_step, later_step
from vdnn.sim.program import FETCH, RELEASE, actions
from vdnn.values.trace import Trace

__all__ = ["Script", "StepMemory", "fits", "step_memory"]

SIDE = 1  # the stream that a hook of torchtune makes its buffers on


@dataclass(frozen=True, slots=True)
class Script:
    """Allocations and frees in program order: `calls` holds k to make piece k, and ~k to free it.

    Pieces are the trace's storages, then a buffer for each move, then a workspace for each op (from `workspaces` on).
    `positions` says where in the step each call is made; -1: before it.
    """

    sizes: list[int]
    calls: list[int]
    positions: list[int]
    streams: dict[int, int]
    workspaces: int

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
        return Script(sizes, calls, positions, streams, workspaces)


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What the allocator made of the steps.

    Peaks are those of the run within the memory, if it fits; else of a run with unbounded memory. `retries` counts
    allocations that had to wait for cached segments to be given back, `without` are the convolutions that found no room
    for their workspace in the later step; `failed_at` is the position (-1: before the step) at which memory ran out,
    `failure` what was missing.
    """

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    fits: bool
    retries: int
    without: tuple[int, ...]
    failed_at: int | None
    failure: str
    allocator: CachingAllocator


def step_memory(
    trace: Trace,
    moves: Sequence[Move],
    capacity: int,
    options: AllocatorOptions | None = None,
) -> StepMemory:
    """Run the allocations of two steps with `capacity` bytes as the limit; and without one, if they do not fit."""
    script = Script.of(trace, moves)
    steps, optional = _steps(trace, script)
    allocator = CachingAllocator(AddressSpace(capacity), options)
    failed_at, failure = None, ""
    retries = 0
    without: tuple[int, ...] = ()
    try:
        without = _play(steps, optional, script, allocator)
        retries = allocator.num_alloc_retries
    except _Failed as failed:
        failed_at, failure = failed.position, str(failed)
        allocator = CachingAllocator(AddressSpace(), options)
        _play(steps, optional, script, allocator)
    total = allocator.total
    return StepMemory(
        total.allocated_bytes_peak,
        total.reserved_bytes_peak,
        failed_at is None,
        retries,
        without,
        failed_at,
        failure,
        allocator,
    )


def fits(trace: Trace, moves: Sequence[Move], capacity: int) -> bool:
    """Whether `step_memory` says so, for who need not know what a step that does not fit would take."""
    script = Script.of(trace, moves)
    try:
        _play(*_steps(trace, script), script, CachingAllocator(AddressSpace(capacity)))
    except _Failed:
        return False
    return True


_Steps = tuple[tuple[list[int], list[int]], ...]  # of each its calls and their positions


def _steps(trace: Trace, script: Script) -> tuple[_Steps, set[int]]:
    """Both steps, and the workspaces that they can do without."""
    optional = {script.workspaces + i for i, op in enumerate(trace.ops) if op.kernel == "conv" and op.workspace_bytes}
    return (first_step(trace, script), later_step(trace, script)), optional


class _Failed(Exception):
    """Memory ran out at a position of a step."""

    def __init__(self, position: int, what: str) -> None:
        super().__init__(what)
        self.position = position


def _play(steps: _Steps, optional: Set[int], script: Script, allocator: CachingAllocator) -> tuple[int, ...]:
    """Make every call; the ops of the last step for whose workspace there was no room.

    Raises:
        _Failed: a call that cannot be made, of a piece that is not `optional`.
    """
    malloc, free, sizes, streams = allocator.malloc, allocator.free, script.sizes, script.streams
    flush = len(sizes)
    addresses = [0] * flush
    without: list[int] = []
    for calls, positions in steps:
        without.clear()
        made = 0
        while made < len(calls):
            try:
                for piece in calls[made:]:
                    if piece < 0:
                        if addresses[~piece]:
                            free(addresses[~piece])
                    elif piece == flush:
                        allocator.empty_cache()
                    else:
                        addresses[piece] = malloc(sizes[piece], streams.get(piece, 0))
                    made += 1
            except DeviceOutOfMemory as error:
                piece = calls[made]
                if piece not in optional:
                    raise _Failed(positions[made], str(error)) from None
                addresses[piece] = 0
                without.append(piece - script.workspaces)
                made += 1
    return tuple(without)
