"""When each storage occupies the device, without a plan and under one: memory from program order alone.

    moves = resolve(plan, trace)            vdnn.analysis.moments: what goes out and comes back, and when
    requested(trace, moves)                 bytes live during each op (exact)
    peak(trace, moves)                      the largest, the op it falls on, and what fills it

A storage that is offloaded occupies the device in [alloc, r) and [f, free), where r is the later of its
release point and the position at which the forward itself lets go of it, and f the position at which its
copy back starts. The copy back always gets a buffer of its own, so a storage that somebody else holds until
backward (`Storage.held`) costs *more* memory when it is offloaded: no policy may do that.

Plain lists, on purpose: the numbers are too few for numpy to be faster (reading them out of a trace is what
takes the time), and importing it would double the start of every command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from vdnn.analysis.moments import MOVABLE, Move, released_at
from vdnn.values.result import PeakItem
from vdnn.values.trace import Trace

__all__ = ["Peak", "host_bytes", "largest_working_set", "least_peak", "op_text", "peak", "requested", "reuse_distances"]

# start, end, bytes, storage: occupies the device from position start up to position end
_Stay = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Peak:
    """The largest sum of live bytes: during which op (-1: the trace has none), and what it is made of."""

    nbytes: int
    op: int
    items: tuple[PeakItem, ...]


# -- memory --------------------------------------------------------------------------------------


def _stays(trace: Trace, moves: Sequence[Move]) -> list[_Stay]:
    """Every storage's stay, then those of the fetched buffers."""
    stays = [(s.alloc if s.alloc > 0 else 0, s.free, s.nbytes, i) for i, s in enumerate(trace.storages)]
    for storage, position in released_at(moves).items():
        s = trace.storages[storage]
        stays[storage] = (max(s.alloc, 0), min(max(position, s.release), s.free), s.nbytes, storage)
    for move in moves:
        if move.fetch is not None and move.fetch[0] < move.until:
            stays.append((move.fetch[0], move.until, move.nbytes, move.storage))
    return stays


def _live(trace: Trace, stays: Sequence[_Stay]) -> list[int]:
    change = [0] * (len(trace.ops) + 1)
    for start, end, nbytes, _ in stays:
        if start < end:
            change[start] += nbytes
            change[end] -= nbytes
    return [held + op.workspace_bytes for held, op in zip(accumulate(change), trace.ops, strict=False)]


def requested(trace: Trace, moves: Sequence[Move] = ()) -> list[int]:
    """Bytes live during each op: storages, fetched buffers, and the op's own workspace."""
    return _live(trace, _stays(trace, moves))


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
    stays = _stays(trace, moves)
    live = _live(trace, stays)
    most = max(live)
    op = live.index(most)
    parts: dict[tuple[str, str], int] = {}
    for start, end, nbytes, storage in stays:
        if start <= op < end:
            s = trace.storages[storage]
            module = trace.module_name(trace.ops[s.alloc].module) if s.alloc >= 0 else ""
            parts[s.category, module] = parts.get((s.category, module), 0) + nbytes
    workspace = trace.ops[op].workspace_bytes
    if workspace:
        key = ("temporary", trace.module_name(trace.ops[op].module))
        parts[key] = parts.get(key, 0) + workspace
    items = [PeakItem(category, module, size) for (category, module), size in parts.items() if size]
    items.sort(key=lambda item: (-item.nbytes, item.category, item.module))
    return Peak(most, op, tuple(items))


def host_bytes(trace: Trace, moves: Sequence[Move]) -> list[int]:
    """Pinned bytes at each position: a host buffer lives from the pack until autograd lets go of the tensor."""
    change = [0] * (len(trace.ops) + 2)
    for move in moves:
        change[move.out[0]] += move.nbytes
        change[move.host_until] -= move.nbytes
    return list(accumulate(change[:-1]))


# -- analysis ------------------------------------------------------------------------------------


def least_peak(trace: Trace) -> int:
    """The peak that no offload plan goes below: every saved storage away from release to need, in no time at all.

    What backward needs at once, what others hold, parameters, gradients, optimizer states and temporaries stay.
    """
    first: dict[int, int] = {}
    for t in trace.saved:
        first[t.storage] = min(first.get(t.storage, t.packed_at), t.packed_at)
    stays = []
    for i, s in enumerate(trace.storages):
        gone = max(s.release, first[i]) if i in first else s.free
        back = s.need if s.need >= 0 else s.free
        away = s.category in MOVABLE and i in first and not s.held and gone < back
        for begin, end in [(s.alloc, gone), (back, s.free)] if away else [(s.alloc, s.free)]:
            stays.append((max(begin, 0), end, s.nbytes, i))
    return max(_live(trace, stays), default=0)


def largest_working_set(trace: Trace) -> int:
    """The most that one op touches, with its workspace: no technique that runs the op whole goes below it."""
    return max(
        (sum(trace.storages[i].nbytes for i in {*op.reads, *op.writes}) + op.workspace_bytes for op in trace.ops),
        default=0,
    )


def reuse_distances(trace: Trace, op_ns: Sequence[int]) -> list[int]:
    """For each storage, the time from its last pack until backward needs it (paper, Fig. 6); -1 if it never does."""
    clock = list(accumulate(op_ns, initial=0))
    last: dict[int, int] = {}
    for t in trace.saved:
        last[t.storage] = max(last.get(t.storage, 0), t.packed_at)
    return [clock[s.need] - clock[last[i]] if i in last and s.need >= 0 else -1 for i, s in enumerate(trace.storages)]
