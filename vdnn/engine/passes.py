"""`Pass`: one forward and the backward that follows it, and the storages that were saved in it.

Its tables hold storages weakly: what autograd has dropped is gone, whenever and in whatever thread that was.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable

import torch
from torch import nn

from vdnn.calls import Frame
from vdnn.engine.schedule import NOTHING, Schedule
from vdnn.engine.storage import SavedStorage
from vdnn.values.plan import OUTSIDE

__all__ = ["Pass", "extent", "same_counter"]

_set_version = torch._C._autograd._unsafe_set_version_counter

_NOWHERE = nn.Module()  # stands for the module of what is packed outside every module of the model
# One copy of a storage: whose bytes, at which version, which of them, and the copy.
_Copy = tuple[weakref.ref[torch.UntypedStorage], int, int, int, weakref.ref[SavedStorage]]


class Pass:
    """What the engine knows of one pass."""

    __slots__ = (
        "__weakref__",
        "_copies",
        "_entries",
        "_inflight",
        "_inflight_bytes",
        "ahead_bytes",
        "next_ahead",
        "order",
        "outside",
        "schedule",
    )

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.order: list[weakref.ref[SavedStorage]] = []  # those that left by rule, in pack order
        self.ahead_bytes = 0  # fetched before backward asked, and not asked for yet
        self.next_ahead: int | None = None  # place in `order` of the next one to fetch ahead
        # packs outside every module of the model
        self.outside = Frame(_NOWHERE, OUTSIDE, 0, None)
        self.outside.slot = schedule.calls.get((OUTSIDE, 0), NOTHING)
        self._entries: dict[int, list[weakref.ref[SavedStorage]]] = {}
        self._copies: dict[int, list[_Copy]] = {}
        self._inflight: deque[tuple[int, weakref.ref[SavedStorage]]] = deque()
        self._inflight_bytes = 0

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
            self._entries.setdefault(entry, []).append(weak)
        else:
            saved.place = len(self.order)
            self.order.append(weak)
            self._inflight.append((saved.nbytes, weak))
            self._inflight_bytes += saved.nbytes

    def release_oldest(self) -> None:
        """Release those on their way by rule, oldest first, until the rest is within the rule's bound."""
        bound = self.schedule.rule.max_inflight_bytes
        while self._inflight_bytes > bound:
            nbytes, weak = self._inflight.popleft()
            self._inflight_bytes -= nbytes
            saved = weak()
            if saved is not None:
                saved.release()

    def of_entries(self, entries: Iterable[int]) -> list[SavedStorage]:
        """Those that live and belong to these entries of the plan."""
        found = []
        for entry in entries:
            for weak in self._entries.get(entry, ()):
                saved = weak()
                if saved is not None:
                    found.append(saved)
        return found


def same_counter(one: torch.Tensor, other: torch.Tensor, version: int) -> bool:
    """Whether two tensors at this version have one version counter, so that a change through either is seen in both.

    Tensors of one storage need not: those that `unsafe_chunk` gives (LSTM and GRU cells change them in place) and
    those of `.data` count for themselves. There is no asking, so it is tried out.
    """
    _set_version((one,), (version + 1,))
    try:
        return other._version == version + 1
    finally:
        _set_version((one,), (version,))


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and number of bytes that the tensor spans in its storage."""
    size = tensor.element_size()
    first = int(tensor.storage_offset()) * size
    if tensor.is_contiguous():
        return first, tensor.nbytes
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return first, (int(last) + 1) * size
