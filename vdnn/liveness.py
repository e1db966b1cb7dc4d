"""When each storage occupies the device, without a plan and under one: memory from program order alone.

    moves = resolve(plan, trace)            vdnn.moments: what goes out and comes back, and when
    requested(trace, moves)                 bytes live during each op (numpy, exact)
    peak(trace, moves)                      the largest, the op it falls on, and what fills it

A storage that is offloaded occupies the device in [alloc, r) and [f, free), where r is the later of its
release point and the position at which the forward itself lets go of it, and f the position at which its
copy back starts. The copy back always gets a buffer of its own, so a storage that somebody else holds until
backward (`Storage.held`) costs *more* memory when it is offloaded: no policy may do that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vdnn.moments import MOVABLE, Move
from vdnn.values.result import PeakItem
from vdnn.values.trace import Trace

__all__ = ["Peak", "host_bytes", "largest_working_set", "least_peak", "op_text", "peak", "requested", "reuse_distances"]

Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Peak:
    """The largest sum of live bytes: during which op (-1: the trace has none), and what it is made of."""

    nbytes: int
    op: int
    items: tuple[PeakItem, ...]


# -- memory --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Occupancy:
    """Everything that occupies the device, from `starts` up to `ends`: storages first, then fetched buffers."""

    starts: Array
    ends: Array
    nbytes: Array
    storages: list[int]


def _occupancy(trace: Trace, moves: Sequence[Move]) -> _Occupancy:
    starts = [s.alloc if s.alloc > 0 else 0 for s in trace.storages]
    ends = [s.free for s in trace.storages]
    nbytes = [s.nbytes for s in trace.storages]
    storages = list(range(len(starts)))
    for move in moves:
        s = trace.storages[move.storage]
        ends[move.storage] = min(max(move.release[0], s.release), s.free)
        if move.fetch is not None and move.fetch[0] < s.free:
            starts.append(move.fetch[0])
            ends.append(s.free)
            nbytes.append(move.nbytes)
            storages.append(move.storage)
    columns = [np.array(column, dtype=np.int64) for column in (starts, ends, nbytes)]
    return _Occupancy(columns[0], columns[1], columns[2], storages)


def _live(trace: Trace, held: _Occupancy) -> Array:
    live = _sum_live(held.starts, held.ends, held.nbytes, len(trace.ops))
    return live + np.array([op.workspace_bytes for op in trace.ops], dtype=np.int64)


def _sum_live(starts: Array, ends: Array, nbytes: Array, n: int) -> Array:
    change = np.zeros(n + 1, dtype=np.int64)
    np.add.at(change, starts, nbytes)
    np.subtract.at(change, np.maximum(ends, starts), nbytes)
    return np.cumsum(change)[:n]


def requested(trace: Trace, moves: Sequence[Move] = ()) -> Array:
    """Bytes live during each op: storages, fetched buffers, and the op's own workspace."""
    return _live(trace, _occupancy(trace, moves))


def op_text(trace: Trace, op: int) -> str:
    """An op for people: its name, module and phase."""
    if op < 0:
        return ""
    return f"{trace.ops[op].name} in {trace.module_name(trace.ops[op].module)} ({trace.ops[op].phase})"


def peak(trace: Trace, moves: Sequence[Move] = ()) -> Peak:
    """The peak, at the first op that reaches it, with its parts by category and module, largest first.

    A storage belongs to the module whose op made it; what was there before the step is summed under "".
    """
    if not trace.ops:
        return Peak(0, -1, ())
    held = _occupancy(trace, moves)
    live = _live(trace, held)
    op = int(np.argmax(live))
    parts: dict[tuple[str, str], int] = {}
    for row in np.flatnonzero((held.starts <= op) & (op < held.ends)):
        s = trace.storages[held.storages[row]]
        module = trace.module_name(trace.ops[s.alloc].module) if s.alloc >= 0 else ""
        parts[s.category, module] = parts.get((s.category, module), 0) + int(held.nbytes[row])
    workspace = trace.ops[op].workspace_bytes
    if workspace:
        key = ("temporary", trace.module_name(trace.ops[op].module))
        parts[key] = parts.get(key, 0) + workspace
    items = [PeakItem(category, module, size) for (category, module), size in parts.items() if size]
    items.sort(key=lambda item: (-item.nbytes, item.category, item.module))
    return Peak(int(live[op]), op, tuple(items))


def host_bytes(trace: Trace, moves: Sequence[Move]) -> Array:
    """Pinned bytes at each position: a host buffer lives from the pack until autograd lets go of the tensor."""
    change = np.zeros(len(trace.ops) + 2, dtype=np.int64)
    for move in moves:
        change[move.out[0]] += move.nbytes
        change[max(trace.storages[move.storage].free, move.out[0] + 1)] -= move.nbytes
    return np.cumsum(change)[:-1]


# -- analysis ------------------------------------------------------------------------------------


def least_peak(trace: Trace) -> int:
    """The peak that no offload plan goes below: every saved storage away from release to need, in no time at all.

    What backward needs at once, what others hold, parameters, gradients, optimizer states and temporaries stay.
    """
    first: dict[int, int] = {}
    for t in trace.saved:
        first[t.storage] = min(first.get(t.storage, t.packed_at), t.packed_at)
    starts, ends, nbytes = [], [], []
    for i, s in enumerate(trace.storages):
        gone = max(s.release, first[i]) if i in first else s.free
        back = s.need if s.need >= 0 else s.free
        away = s.category in MOVABLE and i in first and not s.held and gone < back
        for begin, end in [(s.alloc, gone), (back, s.free)] if away else [(s.alloc, s.free)]:
            starts.append(max(begin, 0))
            ends.append(max(end, begin, 0))
            nbytes.append(s.nbytes)
    columns = np.array([starts, ends, nbytes], dtype=np.int64).reshape(3, -1)
    live = _live(trace, _Occupancy(columns[0], columns[1], columns[2], []))
    return int(live.max(initial=0))


def largest_working_set(trace: Trace) -> int:
    """The most that one op touches, with its workspace: no technique that runs the op whole goes below it."""
    return max(
        (sum(trace.storages[i].nbytes for i in {*op.reads, *op.writes}) + op.workspace_bytes for op in trace.ops),
        default=0,
    )


def reuse_distances(trace: Trace, op_ns: Sequence[int]) -> list[int]:
    """For each storage, the time from its last pack until backward needs it (paper, Fig. 6); -1 if it never does."""
    clock = np.concatenate(([0], np.cumsum(np.asarray(op_ns, dtype=np.int64))))
    last: dict[int, int] = {}
    for t in trace.saved:
        last[t.storage] = max(last.get(t.storage, 0), t.packed_at)
    return [
        int(clock[s.need] - clock[last[i]]) if i in last and s.need >= 0 else -1 for i, s in enumerate(trace.storages)
    ]
