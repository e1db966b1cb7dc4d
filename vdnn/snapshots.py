"""PyTorch memory snapshots as values: read from a pickle without running anything of it, and written.

A snapshot is what `torch.cuda.memory._snapshot()` returns and `_dump_snapshot(FILE)` writes: the segments with their
blocks at that moment, and for each device the allocator's events before it.

Unpickling runs what the file asks for, so torch's own `pickle.load` of a stranger's file is unsafe. The reader here
knows the pickle opcodes that make dicts, lists, tuples, strings, numbers, booleans and None, and no others.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vdnn.errors import FormatError, UsageError

__all__ = [
    "BlockRecord",
    "EventRecord",
    "SegmentRecord",
    "Snapshot",
    "plain_unpickle",
    "read_snapshot",
    "save_snapshot",
]

ACTIONS = frozenset(
    (
        *("alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap"),
        *("oom", "snapshot", "user_defined", "annotate"),
    )
)
_STATES = {
    "active_allocated": "allocated",
    "active_awaiting_free": "awaiting",
    "active_pending_free": "awaiting",
    "inactive": "free",
}


class EventRecord(NamedTuple):
    """One event; `addr` of an "oom" is the device's free memory. `stream` is the address of the CUDA stream."""

    action: str
    addr: int
    size: int
    stream: int
    pool: tuple[int, int]


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """A block of a segment: "allocated", "awaiting" (freed, another stream uses it still) or "free"."""

    addr: int
    size: int
    requested: int
    state: str


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """A segment as it was when the snapshot was taken."""

    device: int
    addr: int
    size: int
    stream: int
    small: bool
    expandable: bool
    pool: tuple[int, int]
    allocated: int
    active: int
    requested: int
    blocks: tuple[BlockRecord, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Segments of all devices, events by device, the allocator's settings and, if there, `memory_stats()` by device."""

    segments: tuple[SegmentRecord, ...]
    events: tuple[tuple[EventRecord, ...], ...]
    settings: dict[str, Any]
    statistics: dict[int, dict[str, int]]


# -- the pickle ------------------------------------------------------------------------------------

_MARK = object()


def plain_unpickle(data: bytes) -> Any:
    """What a pickle of plain containers holds.

    Raises:
        FormatError: it is truncated, or asks for anything else: a class, a function, a call.
    """
    try:
        return _unpickle(data)
    except (IndexError, struct.error, KeyError, UnicodeDecodeError, TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError("the pickle is damaged or ends in the middle: copy the file again") from None


def _unpickle(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    put = stack.append
    unpack_u4, unpack_i4 = struct.Struct("<I").unpack_from, struct.Struct("<i").unpack_from
    unpack_u8, unpack_f8 = struct.Struct("<Q").unpack_from, struct.Struct(">d").unpack_from
    i = 0

    def text(start: int, size: int) -> str:
        if start + size > len(data):
            raise IndexError
        return data[start : start + size].decode("utf-8", "surrogatepass")

    def since_mark() -> list[Any]:
        at = len(stack) - 1
        while stack[at] is not _MARK:  # IndexError once there is none
            at -= 1
            if at < 0:
                raise IndexError
        items = stack[at + 1 :]
        del stack[at:]
        return items

    while True:
        op = data[i]
        i += 1
        if op == 0x68:  # BINGET; the most frequent come first
            put(memo[data[i]])
            i += 1
        elif op == 0x6A:  # LONG_BINGET
            put(memo[unpack_u4(data, i)[0]])
            i += 4
        elif op == 0x4B:  # BININT1
            put(data[i])
            i += 1
        elif op == 0x4A:  # BININT
            put(unpack_i4(data, i)[0])
            i += 4
        elif op == 0x4D:  # BININT2
            put(data[i] | data[i + 1] << 8)
            i += 2
        elif op == 0x8A:  # LONG1
            size = data[i]
            if i + 1 + size > len(data):
                raise IndexError
            put(int.from_bytes(data[i + 1 : i + 1 + size], "little", signed=True))
            i += 1 + size
        elif op == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif op == 0x8C:  # SHORT_BINUNICODE
            put(text(i + 1, data[i]))
            i += 1 + data[i]
        elif op == 0x28:  # MARK
            put(_MARK)
        elif op == 0x7D:  # EMPTY_DICT
            put({})
        elif op == 0x5D:  # EMPTY_LIST
            put([])
        elif op == 0x75:  # SETITEMS
            items = since_mark()
            if len(items) % 2:
                raise IndexError
            _of(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
        elif op == 0x65:  # APPENDS
            items = since_mark()
            _of(stack[-1], list).extend(items)
        elif op == 0x71:  # BINPUT
            memo[data[i]] = stack[-1]
            i += 1
        elif op == 0x72:  # LONG_BINPUT
            memo[unpack_u4(data, i)[0]] = stack[-1]
            i += 4
        elif op == 0x73:  # SETITEM
            item = stack.pop()
            key = stack.pop()
            _of(stack[-1], dict)[key] = item
        elif op == 0x61:  # APPEND
            item = stack.pop()
            _of(stack[-1], list).append(item)
        elif op in (0x88, 0x89, 0x4E):  # NEWTRUE, NEWFALSE, NONE
            put({0x88: True, 0x89: False, 0x4E: None}[op])
        elif op == 0x29:  # EMPTY_TUPLE
            put(())
        elif op in (0x85, 0x86, 0x87):  # TUPLE1 … TUPLE3
            size = op - 0x84
            if len(stack) < size:
                raise IndexError
            stack[-size:] = [tuple(stack[-size:])]
        elif op == 0x74:  # TUPLE
            put(tuple(since_mark()))
        elif op == 0x47:  # BINFLOAT
            put(unpack_f8(data, i)[0])
            i += 8
        elif op == 0x58:  # BINUNICODE
            size = unpack_u4(data, i)[0]
            put(text(i + 4, size))
            i += 4 + size
        elif op == 0x8D:  # BINUNICODE8
            size = unpack_u8(data, i)[0]
            put(text(i + 8, size))
            i += 8 + size
        elif op == 0x95:  # FRAME
            i += 8
        elif op == 0x80:  # PROTO
            if data[i] > 5:
                raise FormatError(f"the file is a pickle of protocol {data[i]}, or none at all: 5 is the newest known")
            i += 1
        elif op == 0x2E:  # STOP
            if len(stack) != 1 or stack[0] is _MARK:
                raise IndexError
            return stack[0]
        else:
            raise FormatError(
                f"byte {i - 1} of the file is the pickle opcode {op:#04x}, which no memory snapshot needs: it is "
                "another file, or one that would run code when it is loaded; nothing of it was run"
            )


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise IndexError
    return value


# -- the snapshot ----------------------------------------------------------------------------------


def read_snapshot(path: str | Path) -> Snapshot:
    """A snapshot's file, checked.

    Raises:
        FormatError: it cannot be read, is truncated, would run code, or is no snapshot of CUDA's caching allocator.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from None
    try:
        return _snapshot(plain_unpickle(data))
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def _snapshot(raw: Any) -> Snapshot:
    if isinstance(raw, list):  # `memory_snapshot()`: segments alone
        raw = {"segments": raw, "device_traces": []}
    if not isinstance(raw, dict) or not isinstance(raw.get("segments"), list):
        raise FormatError("no memory snapshot: it must be a dict with segments and device_traces")
    traces = raw.get("device_traces", [])
    if not isinstance(traces, list) or not all(isinstance(trace, list) for trace in traces):
        raise FormatError("device_traces must be a list with a list of events for each device")
    settings = raw.get("allocator_settings", {})
    if not isinstance(settings, dict):
        raise FormatError("allocator_settings must be a dict")
    segments = tuple(_segment(i, item) for i, item in enumerate(raw["segments"]))
    events = tuple(tuple(_event(device, i, e) for i, e in enumerate(trace)) for device, trace in enumerate(traces))
    return Snapshot(segments, events, settings, _statistics(raw.get("memory_stats", {})))


def _statistics(raw: Any) -> dict[int, dict[str, int]]:
    """`memory_stats()` is not in torch's own snapshots; who records one may add it, of device 0 or by device."""
    if not isinstance(raw, dict):
        raise FormatError("memory_stats must be a dict")
    by_device = raw if all(isinstance(key, int) for key in raw) else {0: raw}
    if not all(isinstance(numbers, dict) for numbers in by_device.values()):
        raise FormatError("memory_stats must be what torch.cuda.memory_stats() returns, or such a dict by device")
    return {
        device: {name: number for name, number in numbers.items() if isinstance(name, str) and isinstance(number, int)}
        for device, numbers in by_device.items()
    }


def _event(device: int, i: int, raw: Any) -> EventRecord:
    if not isinstance(raw, dict) or not isinstance(raw.get("action"), str):
        raise FormatError(f"event {i} of device {device} is no dict with an action")
    action = raw["action"]
    if action not in ACTIONS:
        raise FormatError(
            f"event {i} of device {device} is {action[:40]!r}, which PyTorch's caching allocator does not record"
        )
    where = f"event {i} ({action}) of device {device}"
    if action in ("user_defined", "annotate"):
        return EventRecord(action, 0, 0, 0, (0, 0))
    addr = _number(raw, "device_free" if action == "oom" else "addr", where, 0 if action == "snapshot" else None)
    pool = _pool(raw.get("pool_id", (0, 0)), where)
    return EventRecord(action, addr, _number(raw, "size", where), _number(raw, "stream", where, 0), pool)


def _segment(i: int, raw: Any) -> SegmentRecord:
    where = f"segment {i}"
    if not isinstance(raw, dict) or not isinstance(raw.get("blocks"), list):
        raise FormatError(f"{where} is no dict with blocks")
    kind = raw.get("segment_type")
    if kind not in ("small", "large"):
        raise FormatError(
            f"{where} is of type {str(kind)[:40]!r}, not small or large: a snapshot of another allocator backend, or "
            "made by the profiler; record it with torch.cuda.memory._record_memory_history()"
        )
    addr, size = _number(raw, "address", where), _number(raw, "total_size", where)
    blocks = []
    here = addr
    for j, item in enumerate(raw["blocks"]):
        block = f"block {j} of {where}"
        if not isinstance(item, dict) or item.get("state") not in _STATES:
            raise FormatError(f"{block} has no state that is known: {', '.join(_STATES)}")
        nbytes = _number(item, "size", block)
        if _number(item, "address", block, here) != here:
            raise FormatError(f"{block} is at {item['address']:#x}, not where the one before it ends")
        state = _STATES[item["state"]]
        requested = _number(item, "requested_size", block, nbytes)
        blocks.append(BlockRecord(here, nbytes, 0 if state == "free" else requested, state))
        here += nbytes
    if here != addr + size:
        raise FormatError(f"the blocks of {where} have {here - addr} bytes, it has {size}")
    active = sum(b.size for b in blocks if b.state != "free")
    allocated = sum(b.size for b in blocks if b.state == "allocated")
    return SegmentRecord(
        _number(raw, "device", where, 0),
        addr,
        size,
        _number(raw, "stream", where, 0),
        kind == "small",
        bool(raw.get("is_expandable", False)),
        _pool(raw.get("segment_pool_id", (0, 0)), where),
        _number(raw, "allocated_size", where, allocated),
        _number(raw, "active_size", where, active),
        _number(raw, "requested_size", where, sum(b.requested for b in blocks)),
        tuple(blocks),
    )


def _number(raw: dict[Any, Any], name: str, where: str, default: int | None = None) -> int:
    number = raw.get(name, default)
    if type(number) is not int or not 0 <= number < 1 << 64:
        raise FormatError(f"{where}: {name} is {str(number)[:40]}, it must be a whole number that is not negative")
    return number


def _pool(raw: Any, where: str) -> tuple[int, int]:
    if isinstance(raw, list | tuple) and len(raw) == 2 and all(type(part) is int for part in raw):
        return raw[0], raw[1]
    raise FormatError(f"{where}: the pool's id must be two whole numbers")


def save_snapshot(snapshot: dict[str, Any], path: str | Path) -> None:
    """Write a snapshot as torch does; its viewer reads protocol 4 at most.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        with open(path, "wb") as file:
            pickle.dump(snapshot, file, protocol=4)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
