"""The pack and unpack hooks: what to do with each saved tensor, by plan or by rule.

    pack(t):    parameter, buffer, small, foreign? → Kept
                storage known at this version?     → Offloaded, sharing the one copy
                plan (or rule) says offload?       → SavedStorage.offload(), Offloaded
                then: the releases that the plan puts at this pack
    unpack(p):  its own fetch, the prefetches that the plan puts here, the waits, the tensor

One *pass* is one forward of the wrapped model with the backward that follows. Its tables hold storages
weakly: what autograd has dropped is gone, whenever and in whatever thread that was.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from vdnn.calls import Frame
from vdnn.engine.device import Device
from vdnn.engine.lifecycle import State
from vdnn.engine.packed import Kept, Offloaded, version_of
from vdnn.engine.schedule import CallSchedule, Schedule, Slot
from vdnn.engine.storage import SavedStorage
from vdnn.values.plan import Keep

__all__ = ["Counts", "Offloader", "Pass", "storage_keys"]

_EMPTY = CallSchedule()


@dataclass(slots=True)
class Counts:
    """What the engine did so far. Bytes are of storages, each counted once a pass."""

    passes: int = 0
    packs: int = 0
    saved_storages: int = 0
    offloaded_storages: int = 0
    offloaded_bytes: int = 0
    prefetched_storages: int = 0
    fetched_storages: int = 0
    returned_bytes: int = 0
    host_full: int = 0
    mismatches: list[str] = field(default_factory=list)


class Pass:
    """One forward and the backward that follows it."""

    __slots__ = (
        "__weakref__",
        "ahead_bytes",
        "entries",
        "inflight",
        "inflight_bytes",
        "known",
        "next_ahead",
        "order",
        "outside",
        "schedule",
    )

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.entries: dict[int, list[weakref.ref[SavedStorage]]] = {}
        # by storage: the weak reference keeps a dead storage's address from being taken for a new one's
        self.known: dict[tuple[int, int, int], tuple[StorageWeakRef, int, weakref.ref[SavedStorage]]] = {}
        self.order: list[weakref.ref[SavedStorage]] = []
        self.inflight: deque[weakref.ref[SavedStorage]] = deque()
        self.inflight_bytes = 0
        self.ahead_bytes = 0  # fetched before backward asked, and not asked for yet
        self.next_ahead: int | None = None  # place in `order` of the next one to fetch ahead
        self.outside = 0


def storage_keys(model: nn.Module) -> set[int]:
    """The storages of a model's parameters and buffers, by address of the storage object."""
    keys = set()
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor.data) is torch.Tensor and tensor.layout is torch.strided and tensor.device.type != "meta":
            keys.add(tensor.untyped_storage()._cdata)
    return keys


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and number of bytes that the tensor spans in its storage."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset()) * tensor.element_size(), (int(last) + 1) * tensor.element_size()


class Offloader:
    """Saved-tensor hooks for one device and one schedule at a time."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.counts = Counts()
        self.current: Pass | None = None
        self.frame: Frame | None = None
        self.fixed: set[int] = set()  # storages of parameters and buffers: never moved
        self._lock = threading.RLock()

    # -- passes and module calls -------------------------------------------------------------------

    def begin(self, schedule: Schedule, fixed: set[int]) -> None:
        """Start a pass."""
        self.current = Pass(schedule)
        self.fixed = fixed
        self.counts.passes += 1

    def enter(self, frame: Frame) -> None:
        """A module call begins."""
        if self.current is not None:
            frame.slot = self.current.schedule.calls.get((frame.fqn, frame.call), _EMPTY)

    def leave(self, frame: Frame) -> None:
        """A module call returns: whatever the plan releases there."""
        if self.current is not None and frame.slot is not None and frame.slot.release:
            self._release(self.current, frame.slot.release)

    def end(self) -> None:
        """The forward of a pass is over; its backward finds the pass through what autograd holds."""
        self.current = None

    # -- pack --------------------------------------------------------------------------------------

    def pack(self, tensor: torch.Tensor) -> Kept | Offloaded | torch.Tensor:
        """Take a tensor that autograd saves."""
        here = self.current
        self.counts.packs += 1
        if here is None:
            return Kept(_alias(tensor), None, None)
        slot, mismatch = self._slot(here, tensor)
        if not here.schedule.rule.offload and (slot is None or slot.entry < 0 or mismatch):
            packed: Kept | Offloaded = Kept(_alias(tensor), here, slot)
        else:
            packed = self._place(here, tensor, slot, mismatch)
        if slot is not None and slot.release:
            self._release(here, slot.release)
        return packed

    def _slot(self, here: Pass, tensor: torch.Tensor) -> tuple[Slot | None, bool]:
        frame = self.frame
        if frame is None:
            call = here.schedule.calls.get(("<outside>", 0), _EMPTY)
            index = here.outside
            here.outside += 1
        else:
            call = frame.slot if frame.slot is not None else _EMPTY
            index = frame.packs
            frame.packs += 1
        slot = call.slots.get(index) if call.slots else None
        if slot is None or slot.name is None:
            return slot, False
        name = slot.name
        same = (
            name.dtype == str(tensor.dtype).removeprefix("torch.")
            and name.rank == tensor.dim()
            and name.nbytes == tensor.numel() * tensor.element_size()
        )
        if not same:
            if len(self.counts.mismatches) < 100:
                self.counts.mismatches.append(
                    f"{name} was planned as {name.dtype} of rank {name.rank} and {name.nbytes} bytes, but is "
                    f"{str(tensor.dtype).removeprefix('torch.')} of rank {tensor.dim()} and "
                    f"{tensor.numel() * tensor.element_size()} bytes"
                )
            return slot, True
        return slot, False

    def _place(self, here: Pass, tensor: torch.Tensor, slot: Slot | None, mismatch: bool) -> Kept | Offloaded:
        if (
            (type(tensor) is not torch.Tensor and type(tensor) is not nn.Parameter)
            or isinstance(tensor, FakeTensor)
            or tensor.layout is not torch.strided
            or not self.device.holds(tensor)
            or tensor.numel() == 0
            or tensor.is_inference()
        ):
            return Kept(_alias(tensor), here, slot)
        storage = tensor.untyped_storage()
        if storage._cdata in self.fixed or storage.nbytes() == 0:
            return Kept(_alias(tensor), here, slot)
        planned = slot is not None and slot.entry >= 0 and not mismatch
        if planned:
            assert slot is not None
            action = here.schedule.actions[slot.entry]
            if isinstance(action, Keep):
                return Kept(_alias(tensor), here, slot)
            whole = action.whole
        else:
            # a small view of a storage that leaves anyway goes with it: kept, it would hold the whole storage here
            if not self._by_rule(here, tensor) and (storage._cdata, 0, storage.nbytes()) not in here.known:
                return Kept(_alias(tensor), here, slot)
            _, span = _extent(tensor)
            whole = 2 * span >= storage.nbytes()
        saved = self._saved_storage(here, tensor, storage, whole, slot.entry if planned and slot else -1)
        if saved is None:
            return Kept(_alias(tensor), here, slot)
        return Offloaded(tensor, saved, here, slot)

    def _by_rule(self, here: Pass, tensor: torch.Tensor) -> bool:
        rule = here.schedule.rule
        if not rule.offload or tensor.numel() * tensor.element_size() < rule.min_bytes:
            return False
        frame = self.frame
        if frame is None:
            return not rule.types
        if rule.types and not isinstance(frame.module, rule.types):
            return False
        # autocast's low-precision copy of a weight is no feature map: the layer casts it once a step for all
        for parameter in frame.module._parameters.values():
            if parameter is not None and parameter.dtype != tensor.dtype and parameter.numel() == tensor.numel():
                return False
        return True

    def _saved_storage(
        self, here: Pass, tensor: torch.Tensor, storage: torch.UntypedStorage, whole: bool, entry: int
    ) -> SavedStorage | None:
        first, nbytes = (0, storage.nbytes()) if whole else _extent(tensor)
        key = (storage._cdata, first, nbytes)
        version = version_of(tensor)
        with self._lock:
            found = here.known.get(key)
            if found is not None and found[1] == version:
                known = found[2]()
                if known is not None:
                    return known
            self.counts.saved_storages += 1
            saved = SavedStorage(self.device, tensor, first, nbytes)
            if not saved.offload():
                self.counts.host_full += 1
                return None
            self.counts.offloaded_storages += 1
            self.counts.offloaded_bytes += nbytes
            weak = weakref.ref(saved)
            here.known[key] = (StorageWeakRef(storage), version, weak)
            saved.place = len(here.order)
            here.order.append(weak)
            if entry >= 0:
                here.entries.setdefault(entry, []).append(weak)
            else:
                here.inflight.append(weak)
                here.inflight_bytes += nbytes
                while here.inflight_bytes > here.schedule.rule.max_inflight_bytes and here.inflight:
                    self._release_oldest(here)
            return saved

    def _release_oldest(self, here: Pass) -> None:
        oldest = here.inflight.popleft()()
        if oldest is not None:
            here.inflight_bytes -= oldest.nbytes
            oldest.release()
        else:
            here.inflight_bytes = sum(s.nbytes for s in (weak() for weak in here.inflight) if s is not None)

    def _release(self, here: Pass, entries: list[int]) -> None:
        for saved in self._alive(here, entries):
            saved.release()

    @staticmethod
    def _alive(here: Pass, entries: list[int]) -> list[SavedStorage]:
        found = (weak() for entry in entries for weak in here.entries.get(entry, ()))
        return [saved for saved in found if saved is not None]

    # -- unpack ------------------------------------------------------------------------------------

    def unpack(self, packed: Kept | Offloaded | torch.Tensor) -> torch.Tensor:
        """Give back a tensor that autograd saved; may be called again for the same one."""
        if isinstance(packed, torch.Tensor):
            return packed
        if isinstance(packed, Offloaded):
            storage = packed.storage
            by_rule = packed.slot is None or packed.slot.entry < 0
            if storage.state is State.ON_HOST and storage.prefetch():
                self.counts.fetched_storages += 1
                self.counts.returned_bytes += storage.nbytes
            elif by_rule and storage.state is State.PREFETCHING:
                packed.owner.ahead_bytes -= storage.nbytes
            if by_rule:
                self._ahead(packed.owner, storage)
        slot, owner = packed.slot, packed.owner
        if slot is not None and owner is not None:
            for saved in self._alive(owner, slot.prefetch):
                self._prefetch(saved)
            for saved in self._alive(owner, slot.arrive):
                saved.arrive()
        return packed.restore()

    def _prefetch(self, saved: SavedStorage) -> None:
        if saved.prefetch():
            self.counts.prefetched_storages += 1
            self.counts.returned_bytes += saved.nbytes

    def _ahead(self, here: Pass, asked: SavedStorage) -> None:
        """By rule: fetch what was saved before the one asked for, newest first, up to a bound of bytes."""
        place = asked.place - 1 if here.next_ahead is None else min(here.next_ahead, asked.place - 1)
        bound = here.schedule.rule.ahead_bytes
        while place >= 0:
            saved = here.order[place]()
            if saved is not None and saved.state is State.ON_HOST:
                if here.ahead_bytes + saved.nbytes > bound:
                    break
                here.ahead_bytes += saved.nbytes
                self._prefetch(saved)
            place -= 1
        here.next_ahead = place


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """An alias that shares storage and version counter but not the graph: holding the tensor would make a cycle."""
    return tensor.detach() if tensor.requires_grad or tensor.grad_fn is not None else tensor
