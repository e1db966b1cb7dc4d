"""Two simulated steps as a PyTorch memory snapshot: what `torch.cuda.memory._snapshot()` would return after them.

The viewer at pytorch.org/memory_viz, `torch.cuda._memory_viz` and `vdnn replay` read it. Where torch has the Python
stack of an allocation, there stands the trace's op and module. The steps are a training's first and the next
(vdnn.sim.first_step); one that does not fit ends with its "oom" event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vdnn.analysis.liveness import op_text
from vdnn.analysis.moments import Move, Points
from vdnn.errors import DeviceOutOfMemory, UsageError
from vdnn.sim.allocator import AddressSpace, AllocatorOptions, CachingAllocator
from vdnn.sim.allocator_step import Script
from vdnn.sim.first_step import first_step, later_step
from vdnn.values.timeline import Timeline
from vdnn.values.trace import Trace

__all__ = ["step_snapshot"]

_STATES = ("inactive", "active_allocated", "active_awaiting_free")


def step_snapshot(
    trace: Trace,
    moves: Sequence[Move],
    capacity: int,
    timeline: Timeline | None = None,
    options: AllocatorOptions | None = None,
) -> dict[str, Any]:
    """Run the allocations of two steps within `capacity` bytes, and write down every event of the allocator.

    With a timeline of the same run, events get its times (µs), those of the second step after the first, else they are
    numbered.

    Raises:
        UsageError: the step is not one of a CUDA device.
    """
    if trace.device == "cpu":
        raise UsageError("a step of device cpu has no caching allocator, so no memory snapshot: capture it for cuda")
    script = Script.of(trace, moves)
    allocator = CachingAllocator(AddressSpace(capacity), options)
    history = allocator.history = []
    names = _Names(trace, moves)
    addresses = [0] * len(script.sizes)
    positions: list[tuple[int, int]] = []  # of each event: the step, and where in it
    for step, (calls, places) in enumerate((first_step(trace, script), later_step(trace, script))):
        for call, position in zip(calls, places, strict=True):
            piece = call if call >= 0 else ~call
            allocator.context = str(piece)
            failed = False
            try:
                if call == len(script.sizes):
                    allocator.empty_cache()
                elif call >= 0:
                    addresses[piece] = allocator.malloc(script.sizes[piece], script.streams.get(piece, 0))
                elif addresses[piece]:
                    allocator.free(addresses[piece])
            except DeviceOutOfMemory:
                addresses[piece] = 0
                failed = piece < script.workspaces
            positions += [(step, position)] * (len(history) - len(positions))
            if failed:
                break
        if failed:
            break
    times = _times_us(timeline, len(trace.ops))
    entries: list[dict[str, Any]] = []
    owner: dict[int, str] = {}
    for i, (action, addr, size, stream, context, pool) in enumerate(history):
        entry = {"action": action, "size": size, "stream": stream, "frames": names.frames(context), "pool_id": pool}
        entry["device_free" if action == "oom" else "addr"] = addr
        step, position = positions[i]
        entry["time_us"] = step * (times[len(trace.ops)] + 1) + times[position] if times else i
        entries.append(entry)
        if action == "alloc":
            owner[addr] = context
    return {
        "segments": _segments(allocator, owner, names),
        "device_traces": [entries],
        "allocator_settings": _settings(allocator.options),
        "external_annotations": [],
    }


class _Names:
    """Pieces of a script for people, in the form of a stack of one or two frames."""

    def __init__(self, trace: Trace, moves: Sequence[Move]) -> None:
        self._trace = trace
        self._moves = moves
        self._saved = Points(trace).names
        self._known: dict[str, list[dict[str, Any]]] = {}

    def frames(self, piece: str) -> list[dict[str, Any]]:
        """One list for a piece, however often it is asked for: pickle then writes it once."""
        if piece not in self._known:
            self._known[piece] = [
                {"filename": self._trace.model, "line": max(op, 0), "name": name}
                for op, name in self._lines(int(piece))
            ]
        return self._known[piece]

    def _lines(self, piece: int) -> list[tuple[int, str]]:
        storages, moves = self._trace.storages, self._moves
        if piece < len(storages):
            s = storages[piece]
            if s.alloc < 0:
                return [(-1, " ".join((s.category, s.name or "of before the step")))]
            return [(s.alloc, s.category), (s.alloc, op_text(self._trace, s.alloc))]
        piece -= len(storages)
        if piece < len(moves):
            fetch = moves[piece].fetch
            at = fetch[0] if fetch is not None else -1
            return [(at, f"fetch of {self._saved[moves[piece].saved]}")]
        op = piece - len(moves)
        return [(op, "workspace"), (op, op_text(self._trace, op))]


def _times_us(timeline: Timeline | None, ops: int) -> dict[int, int]:
    """When memory changes at each position, −1 (before the step) to the last; none without a timeline."""
    if timeline is None:
        return {}
    first: dict[int, int] = {}
    for event in timeline.memory:
        if event.where == "device":
            first.setdefault(event.position, event.time_ns // 1000)
    times, now = {-1: 0}, 0
    for position in range(ops + 1):
        now = max(now, first.get(position, now))
        times[position] = now
    return times


def _segments(allocator: CachingAllocator, owner: Mapping[int, str], names: _Names) -> list[dict[str, Any]]:
    found = []
    for blocks in allocator.segments():
        shelf = blocks[0].shelf
        active = [block for block in blocks if block.state]
        found.append(
            {
                "device": 0,
                "address": blocks[0].addr,
                "total_size": sum(block.size for block in blocks),
                "stream": shelf.stream,
                "segment_type": "small" if shelf.small else "large",
                "segment_pool_id": shelf.pool.id,
                "is_expandable": allocator.options.expandable_segments,
                "allocated_size": sum(block.size for block in active if _STATES[block.state] == "active_allocated"),
                "active_size": sum(block.size for block in active),
                "requested_size": sum(block.requested for block in active),
                "frames": [],
                "blocks": [
                    {
                        "address": block.addr,
                        "size": block.size,
                        "requested_size": block.requested if block.state else 0,
                        "state": _STATES[block.state],
                        "frames": names.frames(owner[block.addr]) if block.state else [],
                    }
                    for block in blocks
                ],
            }
        )
    return found


def _settings(options: AllocatorOptions) -> dict[str, Any]:
    """`allocator_settings` as torch fills it; −1: no limit."""
    return {
        "PYTORCH_CUDA_ALLOC_CONF": "",
        "max_split_size": -1 if options.max_split_bytes is None else options.max_split_bytes,
        "garbage_collection_threshold": options.garbage_collection_threshold,
        "expandable_segments": options.expandable_segments,
        "roundup_power2_divisions": {str(1 << i): n for i, n in enumerate(options.roundup_divisions)},
    }
