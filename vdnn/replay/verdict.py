"""What comes of a replay: how much was reproduced, and where the model and the record part.

for each device    rewind to before its first event → restore → follow every event
                   compare every segment, block, and statistic at the end
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vdnn.errors import FormatError
from vdnn.replay.following import Difference, Follower
from vdnn.replay.rewinding import rewind
from vdnn.sim.allocator.options import AllocatorOptions, parse_settings
from vdnn.sim.allocator.restoring import restore
from vdnn.snapshots import SegmentRecord, Snapshot

__all__ = ["DeviceReplay", "recorded_options", "replay_snapshot"]

_STATES = ("free", "allocated", "awaiting")


@dataclass(frozen=True, slots=True)
class DeviceReplay:
    """One device's history: what was in it, what was reproduced, and the first difference (None: there is none).

    `statistics` are those of the model at the end, as `torch.cuda.memory_stats()` names them.
    """

    device: int
    events: int
    reproduced: int
    actions: tuple[tuple[str, int], ...]
    segments: int
    blocks: int
    start_blocks: int
    statistics: dict[str, int]
    checked_statistics: int
    difference: Difference | None
    notes: tuple[str, ...]


def recorded_options(settings: dict[str, Any]) -> AllocatorOptions:
    """The allocator's options from a snapshot's `allocator_settings`.

    Raises:
        FormatError: a setting that cannot be, or another backend.
    """
    text = settings.get("PYTORCH_CUDA_ALLOC_CONF") or settings.get("PYTORCH_ALLOC_CONF") or ""
    if not isinstance(text, str):
        raise FormatError("allocator_settings: the settings must be text")
    options = parse_settings(text)
    known: dict[str, Any] = {name: getattr(options, name) for name in AllocatorOptions.__slots__}
    try:
        if "max_split_size" in settings:
            size = int(settings["max_split_size"])
            known["max_split_bytes"] = size if 0 < size < 1 << 60 else None  # -1: no limit
        if "garbage_collection_threshold" in settings:
            known["garbage_collection_threshold"] = float(settings["garbage_collection_threshold"])
        if "expandable_segments" in settings:
            known["expandable_segments"] = bool(settings["expandable_segments"])
        divisions = settings.get("roundup_power2_divisions")
        if isinstance(divisions, dict) and divisions:
            known["roundup_divisions"] = tuple(int(divisions.get(str(1 << i), 0)) for i in range(16))
    except (TypeError, ValueError):
        raise FormatError("allocator_settings: a number is none") from None
    found = AllocatorOptions(**known)
    try:
        found.check()
    except ValueError as error:
        raise FormatError(f"allocator_settings: {error}") from None
    return found


def replay_snapshot(snapshot: Snapshot) -> list[DeviceReplay]:
    """Play every device's history through the model.

    Raises:
        FormatError: no history at all, or one that contradicts itself.
    """
    if not any(snapshot.events):
        raise FormatError(
            "the snapshot has no events: call torch.cuda.memory._record_memory_history() before what is to be recorded"
        )
    options = recorded_options(snapshot.settings)
    found = []
    for device, events in enumerate(snapshot.events):
        segments = [s for s in snapshot.segments if s.device == device]
        if events:
            found.append(_replay(snapshot, device, segments, options))
    return found


def _replay(
    snapshot: Snapshot, device: int, segments: Sequence[SegmentRecord], options: AllocatorOptions
) -> DeviceReplay:
    events = snapshot.events[device]
    start = rewind(segments, events, options)
    follower = Follower(events, options)
    restore(follower, start.stretches)
    recorded = snapshot.statistics.get(device, {})
    checked = 0
    difference: Difference | None = None
    try:
        while follower.step():
            pass
        _compare(follower, segments)
        checked = _compare_statistics(follower, recorded, from_the_start=not start.stretches)
    except Difference as found:
        difference = found
    notes = []
    if start.blocks or start.stretches:
        notes.append(
            f"the record begins with {len(start.stretches)} segments and {start.blocks} blocks that were there: peaks "
            "are those since then"
        )
    if start.assumed:
        notes.append(
            f"the size of {start.assumed} of those blocks is not recorded and was taken from what was asked for"
        )
    if follower.ties:
        notes.append(
            f"{follower.ties} times one of several free blocks of equal size was taken from the record: which is first "
            "depends on the thread that made its segment"
        )
    if follower.collections:
        notes.append(f"{follower.collections} garbage collections were taken from the record, not decided by the model")
    if any(e.pool != (0, 0) for e in events):
        notes.append("private pools (CUDA graphs, MemPool) are given back when the record says so")
    return DeviceReplay(
        device,
        len(events),
        follower.at,
        tuple(sorted(Counter(e.action for e in events).items())),
        len(segments),
        sum(len(s.blocks) for s in segments),
        start.blocks,
        follower.statistics(),
        checked,
        difference,
        tuple(notes),
    )


def _compare(follower: Follower, segments: Sequence[SegmentRecord]) -> None:
    """The state at the end, block by block."""

    def differs(what: str, recorded: object, modelled: object) -> Difference:
        return Difference(-1, what, str(recorded), str(modelled))

    own = {blocks[0].addr: blocks for blocks in follower.segments()}
    theirs = {segment.addr: segment for segment in segments}
    for addr in sorted(own.keys() | theirs.keys()):
        where = f"the segment at {addr:#x} at the end"
        if addr not in own or addr not in theirs:
            there = ["there is none", "there is one"]
            raise differs(where, there[addr in theirs], there[addr in own])
        segment, blocks = theirs[addr], own[addr]
        shelf = blocks[0].shelf
        kind = (segment.small, segment.stream, segment.pool)
        if kind != (shelf.small, shelf.stream, shelf.pool.id):
            raise differs(f"small, stream and pool of {where}", kind, (shelf.small, shelf.stream, shelf.pool.id))
        for recorded, block in zip(segment.blocks, blocks, strict=False):
            state = _STATES[block.state]
            mine = (block.addr, block.size, state, block.requested if block.state else 0)
            if mine != (recorded.addr, recorded.size, recorded.state, recorded.requested):
                raise differs(
                    f"a block of {where} (address, size, state, requested)",
                    (recorded.addr, recorded.size, recorded.state, recorded.requested),
                    mine,
                )
        if len(segment.blocks) != len(blocks):
            raise differs(f"blocks of {where}", len(segment.blocks), len(blocks))
        sums = (
            sum(b.size for b in blocks),
            sum(b.size for b in blocks if _STATES[b.state] == "allocated"),
            sum(b.size for b in blocks if b.state),
            sum(b.requested for b in blocks if b.state),
        )
        if (segment.size, segment.allocated, segment.active, segment.requested) != sums:
            raise differs(
                f"total, allocated, active and requested bytes of {where}",
                (segment.size, segment.allocated, segment.active, segment.requested),
                sums,
            )


def _compare_statistics(follower: Follower, recorded: dict[str, int], from_the_start: bool) -> int:
    own = follower.statistics()
    checked = 0
    for name, number in own.items():
        comparable = name.endswith(".current") or (from_the_start and name.endswith(".peak"))
        if name in recorded and comparable:
            if recorded[name] != number:
                raise Difference(-1, f"{name} at the end", str(recorded[name]), str(number))
            checked += 1
    return checked
