"""`Pass`: one forward and the backward that follows it, and the storages that were saved in it.

Its tables hold storages weakly: what autograd has dropped is gone, whenever and in whatever thread that was.
"""

from __future__ import annotations

import weakref
from collections import deque

import torch
from torch import nn

from vdnn.calls import Frame
from vdnn.engine.arena import Arena
from vdnn.engine.blocks import BlockRun, BlockStorage
from vdnn.engine.device import Device
from vdnn.engine.encoded import EncodedStorage
from vdnn.engine.recomputed import ChainRun
from vdnn.engine.schedule import NOTHING, Schedule
from vdnn.engine.storage import SavedStorage, same_counter
from vdnn.values.plan import OUTSIDE

__all__ = ["Pass"]

_NOWHERE = nn.Module()  # stands for the module of what is packed outside every module of the model
# One copy of a storage: whose bytes, at which version, which of them, and the copy.
_Copy = tuple[weakref.ref[torch.UntypedStorage], int, int, int, weakref.ref[SavedStorage]]


class Pass:
    """What the engine knows of one pass."""

    __slots__ = (
        "__weakref__",
        "_copies",
        "_inflight",
        "_inflight_bytes",
        "ahead_bytes",
        "arena",
        "block",
        "blocks",
        "by_entry",
        "chains",
        "codes",
        "next_ahead",
        "order",
        "outside",
        "pooled",
        "schedule",
    )

    def __init__(self, schedule: Schedule, arena: Arena | None = None) -> None:
        self.schedule = schedule
        self.arena = arena  # laid out for the schedule, or None
        self.order: list[weakref.ref[SavedStorage]] = []  # those that left by rule, in pack order
        self.ahead_bytes = 0  # fetched before backward asked, and not asked for yet
        self.next_ahead: int | None = None  # place in `order` of the next one to fetch ahead
        # packs outside every module of the model
        self.outside = Frame(_NOWHERE, OUTSIDE, 0, None)
        self.outside.slot = schedule.calls.get((OUTSIDE, 0), NOTHING)
        self.chains: dict[int, ChainRun] = {}  # by plan entry, while forward runs
        self.blocks: dict[str, BlockRun] = {}  # by name of the call, while forward runs
        self.block: BlockRun | None = None  # the one that runs
        self.codes: dict[int, weakref.ref[EncodedStorage]] = {}  # by plan entry
        self.pooled: dict[int, torch.Size] = {}  # of a plan entry of indices: the form of what was pooled
        self.by_entry: dict[int, list[weakref.ref[SavedStorage]]] = {}  # those that a plan moves, by its entries
        self._copies: dict[int, list[_Copy]] = {}
        self._inflight: deque[tuple[int, weakref.ref[SavedStorage]]] = deque()
        self._inflight_bytes = 0

    def chain(self, entry: int) -> ChainRun:
        """The module calls that a plan entry is computed again by."""
        run = self.chains.get(entry)
        if run is None:
            run = self.chains[entry] = ChainRun()
        return run

    def of_block(
        self, device: Device, block: str, entry: int, frame: Frame, tensor: torch.Tensor
    ) -> tuple[BlockStorage | None, bool, str]:
        """What stands for a storage that a block makes again, whether it is new; None, and why, where nothing can."""
        run = self.blocks.get(block)
        if run is None or run.over:
            return None, False, "it is not saved in its block"
        return run.stand_in(device, entry, frame, tensor)

    def copy_of(
        self, tensor: torch.Tensor, storage: torch.UntypedStorage, first: int, nbytes: int
    ) -> SavedStorage | None:
        """The copy of these bytes of the tensor's storage, if there is one of the tensor's version."""
        copies = self._copies.get(storage._cdata)
        if copies is None:
            return None
        version = tensor._version
        for alive, known_version, known_first, known_bytes, weak in copies:
            # an address may be another storage's by now; the object is the same as long as the storage lives
            if known_version == version and known_first == first and known_bytes == nbytes and alive() is storage:
                saved = weak()
                if saved is not None and same_counter(saved.probe, tensor, version):
                    return saved
        return None

    def add(self, storage: torch.UntypedStorage, version: int, saved: SavedStorage, entry: int) -> None:
        """Note a new copy; `entry` is its entry in the plan, or -1."""
        weak = weakref.ref(saved)
        copy = (weakref.ref(storage), version, saved.first, saved.nbytes, weak)
        others = self._copies.get(storage._cdata)
        if others is None:
            self._copies[storage._cdata] = [copy]
        else:
            others[:] = [*(other for other in others if other[0]() is storage), copy]
        if entry >= 0:
            self.add_planned(saved, entry)
        else:
            saved.place = len(self.order)
            self.order.append(weak)
            self._inflight.append((saved.nbytes, weak))
            self._inflight_bytes += saved.nbytes

    def add_planned(self, saved: SavedStorage, entry: int) -> None:
        """Note what leaves and comes back where the plan's entry says so."""
        self.by_entry.setdefault(entry, []).append(weakref.ref(saved))

    def release_oldest(self) -> None:
        """Release those on their way by rule, oldest first, until the rest is within the rule's bound."""
        bound = self.schedule.rule.max_inflight_bytes
        while self._inflight_bytes > bound:
            nbytes, weak = self._inflight.popleft()
            self._inflight_bytes -= nbytes
            saved = weak()
            if saved is not None:
                saved.release()
