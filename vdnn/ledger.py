"""`Ledger`: which storages are alive, what came and went in which order, and what was there at the peak.

A block is opened for each storage when it is first seen. A weak reference to the storage's Python object,
which torch keeps exactly as long as the storage, books its end. Nothing here keeps a storage alive.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vdnn.units import format_bytes
from vdnn.values.result import PeakItem
from vdnn.values.timeline import MemoryEvent, Timeline
from vdnn.values.trace import Category, Phase

__all__ = ["Block", "Ledger", "Where", "is_host", "mark_as_host", "notes", "place", "storages_of"]

HOST_MARK = "vdnn_host_memory"
Where = tuple[Phase, str, Any]  # phase, module, op


def mark_as_host(tensor: torch.Tensor) -> None:
    """Say that this tensor's storage plays host memory: no tracker counts it, for as long as it lives."""
    setattr(tensor.untyped_storage(), HOST_MARK, True)


def is_host(storage: torch.UntypedStorage) -> bool:
    """Whether the storage plays host memory."""
    return bool(getattr(storage, HOST_MARK, False))


def storages_of(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages behind a tensor: one, or those of its parts; none where torch shows none."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter)
    if not plain and is_traceable_wrapper_subclass(parts := cast(Any, tensor)):
        for name in parts.__tensor_flatten__()[0]:
            yield from storages_of(getattr(parts, name))
    elif tensor.layout is torch.sparse_coo:
        yield tensor._indices().untyped_storage()
        yield tensor._values().untyped_storage()
    elif tensor.layout is torch.strided:
        try:
            yield tensor.untyped_storage()
        except NotImplementedError:  # a tensor that is only a handle
            return


class Block:
    """One storage. `settled`: its category will not change; `alive`: its memory is there and counts."""

    __slots__ = ("alive", "category", "module", "nbytes", "phase", "recomputed", "ref", "root", "settled")

    def __init__(self, category: Category, module: str, phase: Phase, settled: bool) -> None:
        self.nbytes = 0
        self.category = category
        self.module = module
        self.phase = phase
        self.settled = settled
        self.recomputed = False
        self.root = False
        self.alive = True
        self.ref: weakref.ref[torch.UntypedStorage] | None = None

    def settle(self, category: Category, module: str | None = None) -> None:
        """Say for good what it is for, and where, if that is known."""
        self.category = category
        self.settled = True
        if module is not None:
            self.module = module


class _Event:
    """Bytes taken or given back; `where` is known where an op did it."""

    __slots__ = ("block", "nbytes", "position", "time_ns", "where")

    def __init__(self, time_ns: int, position: int, nbytes: int, block: Block, where: Where | None) -> None:
        self.time_ns = time_ns
        self.position = position
        self.nbytes = nbytes
        self.block = block
        self.where = where


class Ledger:
    """Bytes alive, their peak, and every change since the window was opened."""

    def __init__(self) -> None:
        self.live_bytes = 0
        self.peak_bytes = 0
        self.position = 0
        self._blocks: dict[int, Block] = {}
        # Storages die in any thread, also in the midst of an addition here: an append to a deque is atomic.
        self._dead: deque[tuple[int, Block]] = deque()
        self._log: list[_Event] = []
        self._resident: list[tuple[Block, int]] = []
        self._peak_index = -1
        self._start = time.perf_counter_ns()
        self._now = 0

    def find(self, storage: torch.UntypedStorage) -> Block | None:
        """The block of a storage that has been seen."""
        return self._blocks.get(id(storage))

    def blocks(self) -> list[Block]:
        """Every block whose storage lives."""
        return list(self._blocks.values())

    def open(self, storage: torch.UntypedStorage, block: Block) -> Block:
        """Follow a storage from now on; its size counts from the first `resize`."""
        key = id(storage)
        blocks, dead = self._blocks, self._dead

        def died(_: object) -> None:
            # the id may be another storage's as soon as this returns
            if blocks.pop(key, None) is not None:
                dead.append((time.perf_counter_ns(), block))

        block.ref = weakref.ref(storage, died)
        blocks[key] = block
        return block

    def resize(self, block: Block, nbytes: int, where: Where | None, time_ns: int | None = None) -> None:
        """Note that a block's size has become `nbytes`."""
        change = nbytes - block.nbytes
        if change == 0:
            return
        block.nbytes = nbytes
        now = time.perf_counter_ns() if time_ns is None else time_ns
        self._now = max(self._now, now - self._start)
        self._log.append(_Event(self._now, self.position, change, block, where))
        self.live_bytes += change
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self._peak_index = len(self._log) - 1

    def drain(self) -> None:
        """Book the deaths since the last call."""
        while self._dead:
            time_ns, block = self._dead.popleft()
            block.alive = False
            block.ref = None
            self.resize(block, 0, None, time_ns)

    def close(self) -> None:
        """Hear of nothing more; what has been booked stays."""
        self.drain()
        for block in self.blocks():
            block.ref = None
        self._blocks.clear()

    def open_window(self) -> None:
        """Begin log and peak anew from what is alive."""
        self.drain()
        self._log = []
        self._resident = [(block, block.nbytes) for block in self.blocks()]
        self.peak_bytes = self.live_bytes
        self._peak_index = -1
        self.position = 0
        self._start = time.perf_counter_ns()
        self._now = 0

    def peak_where(self) -> Where | None:
        """The op that made the peak; None where it was there when the window was opened."""
        return self._log[self._peak_index].where if self._peak_index >= 0 else None

    def peak_items(self) -> tuple[PeakItem, ...]:
        """What is alive at the peak, the largest first."""
        sizes: Counter[tuple[str, str]] = Counter()
        for block, nbytes in self._resident:
            sizes[block.category, block.module] += nbytes
        for event in self._log[: self._peak_index + 1]:
            sizes[event.block.category, event.block.module] += event.nbytes
        ordered = sorted((-nbytes, key) for key, nbytes in sizes.items() if nbytes > 0)
        return tuple(PeakItem(category, module, -nbytes) for nbytes, (category, module) in ordered)

    def timeline(self) -> Timeline:
        """Every change, in order."""
        resident: Counter[str] = Counter()
        for block, nbytes in self._resident:
            resident[block.category] += nbytes
        return Timeline(
            memory=tuple(
                MemoryEvent(event.time_ns, event.position, event.nbytes, event.block.category, "device")
                for event in self._log
            ),
            resident=tuple(sorted((category, nbytes) for category, nbytes in resident.items() if nbytes)),
        )


def place(where: Where | None) -> str:
    """Where that was, for people."""
    if where is None:
        return "what was there before the first op"
    phase, module, func = where
    return f"{phase} of {module}, {func}" if module else f"{phase}, {func}"


def notes(items: tuple[PeakItem, ...], peak: int, requested: int | None) -> tuple[str, ...]:
    """What offload cannot lower at the peak, and what else was asked of CUDA's allocator (`requested`)."""
    sums: Counter[str] = Counter()
    for item in items:
        sums[item.category] += item.nbytes
    activations = sums.pop("activation", 0)
    parts = ", ".join(f"{category.replace('_', ' ')} {format_bytes(nbytes)}" for category, nbytes in sums.most_common())
    lines = [
        f"Offload cannot lower {format_bytes(peak - activations)} of the {format_bytes(peak)} at the peak"
        + (f": {parts}." if parts else "."),
        f"Activations are {format_bytes(activations)} of it: what the op at the peak uses must stay, the rest can go.",
    ]
    if requested is not None:
        lines.append(
            f"The allocator was asked for {format_bytes(requested)} at its peak: "
            f"{format_bytes(requested - peak)} are workspaces of kernels and memory of others on the device."
        )
    return tuple(lines)
