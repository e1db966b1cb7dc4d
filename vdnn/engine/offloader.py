"""The pack and unpack hooks: what to do with each saved tensor, by plan or by rule.

    pack(t):    nothing planned here, no rule, or small?    → kept: one look-up
                parameter, buffer, foreign?                 → kept
                storage known at this version?              → Offloaded, sharing the one copy
                plan (or rule) says offload?                → SavedStorage.offload(), Offloaded
                then: the releases that the plan puts at this pack
    unpack(p):  its own fetch, the prefetches that the plan puts here, the waits, the tensor

Everything that moves a storage happens under one lock: autograd has threads of its own.
"""

from __future__ import annotations

import threading
import weakref

import torch

from vdnn.calls import Frame
from vdnn.engine.account import Counts
from vdnn.engine.arena import Arena
from vdnn.engine.before import untransformed
from vdnn.engine.blocks import BlockRun
from vdnn.engine.device import Device, is_plain
from vdnn.engine.encoded import EncodedStorage, windows_of
from vdnn.engine.lifecycle import State
from vdnn.engine.packed import Kept, Marked, Offloaded, keep, restore_kept
from vdnn.engine.passes import Pass
from vdnn.engine.recomputed import RecomputedStorage
from vdnn.engine.remade import RemadeStorage
from vdnn.engine.schedule import NOTHING, Schedule, Slot
from vdnn.engine.storage import SavedStorage, extent
from vdnn.engine.untouched import belongs, by_rule
from vdnn.errors import DeviceOutOfMemory
from vdnn.values.plan import Encode, Keep, Offload, Recompute

__all__ = ["Offloader"]

_OUT_OF_MEMORY = (torch.OutOfMemoryError, DeviceOutOfMemory)
_MOST_MISMATCHES = 100


class Offloader:
    """Saved-tensor hooks for one device and one schedule at a time."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.counts = Counts()
        self._arena: Arena | None = None
        self.current: Pass | None = None
        self.fixed: set[int] = set()  # storages of parameters and buffers: never moved
        self._frame: Frame | None = None  # the innermost module call; None while no pass is open
        self._slots: dict[int, Slot] = {}  # what the plan knows of its packs
        self._look = False  # whether a rule may take tensors that no plan knows
        self._least_bytes = 0  # and from how large a storage on
        self._lock = threading.RLock()

    # -- passes and module calls -------------------------------------------------------------------

    def begin(self, schedule: Schedule, fixed: set[int]) -> None:
        """Start a pass. `fixed` are the storages of parameters and buffers.

        Raises:
            EngineError: the device cannot copy now.
        """
        self.device.check_open()
        self.current = here = Pass(schedule, self._lay_out(schedule))
        self.fixed = fixed
        self._run(here.outside)
        self._look = schedule.rule.offload
        self._least_bytes = schedule.rule.min_bytes
        self.counts.passes += 1

    def _lay_out(self, schedule: Schedule) -> Arena | None:
        """Host memory for what the plan moves, each storage in its place; None where that is not to be had now."""
        if not schedule.host_sizes:
            return None
        arena = self._arena
        if arena is None:
            arena = self._arena = self.device.host_arena()
        events = arena.lay_out(schedule)
        if events is None:
            return None
        if events:
            for event in events:
                self.device.wait(self.device.offload_stream, event)
            arena.settled()
        return arena

    def enter(self, frame: Frame) -> None:
        """A module call begins."""
        here = self.current
        if here is not None:
            slot = frame.slot = here.schedule.calls.get((frame.fqn, frame.call), NOTHING)
            if slot.block and here.block is None:  # one inside another would run again twice: it stays
                here.block = here.blocks[slot.block] = BlockRun(frame, slot.holds)
            if here.block is not None:
                here.block.enters(frame)
            for entry, _ in slot.links:
                here.chain(entry).begins(frame.module)
            self._run(frame)

    def leave(self, frame: Frame) -> None:
        """A module call returns: whatever the plan releases there."""
        here = self.current
        if here is None or frame.slot is None:
            return
        self._run(frame.parent or here.outside)
        self.counts.packs += frame.packs
        if frame.slot.release:
            self._release(here, frame.slot.release)
        if frame.slot.links or frame.slot.block:
            with self._lock:
                for entry, last in frame.slot.links:
                    here.chain(entry).link(frame.module, frame.args, frame.output, last)
                    if last:
                        self._stays(here, entry)
                if here.block is not None and here.blocks.get(frame.slot.block) is here.block:
                    here.block.ends(frame)
                    if here.block.broken:
                        self._mismatch(f"{frame.slot.block} is not computed again: {here.block.broken}")
                    here.block = None

    def _run(self, frame: Frame) -> None:
        self._frame, self._slots = frame, frame.slot.slots

    def end(self) -> None:
        """The forward of a pass is over; its backward finds the pass through what autograd holds."""
        if self.current is not None:
            self.counts.packs += self.current.outside.packs
            self.current.chains.clear()
            self.current.blocks.clear()
            self.current.block = None
        self.current = self._frame = None

    def close(self) -> None:
        """No pass comes any more: host memory that is free goes back to the system."""
        self._arena = None
        self.device.trim()

    # -- pack --------------------------------------------------------------------------------------

    def pack(self, tensor: torch.Tensor) -> Kept | Marked | Offloaded:
        """Take a tensor that autograd saves."""
        frame = self._frame
        if frame is not None:
            index = frame.packs
            frame.packs = index + 1
            slots = self._slots
            slot = slots.get(index) if slots else None
            if slot is not None or (
                self._look and is_plain(tensor) and tensor.untyped_storage().nbytes() >= self._least_bytes
            ):
                return self._take(frame, tensor, slot)
        # `keep`, written out: most saved tensors pass here
        if not tensor.is_leaf:
            tensor = tensor.detach()
        return tensor, tensor._version

    def _take(self, frame: Frame, tensor: torch.Tensor, slot: Slot | None) -> Kept | Marked | Offloaded:
        here = self.current
        assert here is not None
        storage = self._choose(here, frame, tensor, slot)
        if storage is not None:
            packed: Kept | Marked | Offloaded = Offloaded(tensor, storage, here, slot)
        elif slot is not None and slot.marks:
            packed = Marked(tensor, here, slot)
        else:
            packed = keep(tensor)
        if slot is not None:
            for entry in slot.source_of:
                here.chain(entry).begins_with(packed, tensor)
            if slot.input_of and slot.input_of in here.blocks:
                here.blocks[slot.input_of].begins_with(packed, tensor)
            for entry in slot.pooled_to:
                here.pooled[entry] = tensor.shape
            if slot.release:
                self._release(here, slot.release)
        return packed

    def _choose(
        self, here: Pass, frame: Frame, tensor: torch.Tensor, slot: Slot | None
    ) -> SavedStorage | RemadeStorage | None:
        """What stands for the tensor, its copy started if need be; None where the tensor stays."""
        action: Offload | Recompute | Encode | None = None
        if slot is not None and slot.action is not None:
            if not slot.fits(tensor):
                self._mismatch(slot.mismatch(tensor))
            elif isinstance(slot.action, Keep):
                return None
            else:
                action = slot.action
        if action is None and not self._look:
            return None
        if not is_plain(tensor) or not self.device.holds(tensor):
            return None
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes == 0 or tensor.numel() == 0 or storage._cdata in self.fixed:
            return None
        if frame.module._parameters and belongs(frame, storage):
            return None
        if isinstance(action, Recompute):
            assert slot is not None
            return self._computed_again(here, frame, slot, action.block, tensor)
        if isinstance(action, Encode):
            assert slot is not None
            return self._encoded(here, frame, slot, action, tensor)
        if action is not None:
            assert slot is not None
            whole, entry = action.whole, slot.entry
        else:
            # a small view of a storage that leaves anyway goes with it: kept, it would hold the whole storage here
            if not by_rule(here.schedule.rule, frame, tensor) and here.copy_of(tensor, storage, 0, nbytes) is None:
                return None
            whole, entry = 2 * tensor.nbytes >= nbytes or 2 * extent(tensor)[1] >= nbytes, -1
        return self._copy(here, tensor, storage, (0, nbytes) if whole else extent(tensor), entry)

    def _computed_again(
        self, here: Pass, frame: Frame, slot: Slot, block: str, tensor: torch.Tensor
    ) -> RecomputedStorage | None:
        """What stands for a storage that its modules or its block make again; None where they turned out not to."""
        known: RecomputedStorage | None
        with self._lock:
            if block:
                known, new, why = here.of_block(self.device, block, slot.entry, frame, tensor)
            else:
                known, new, why = here.chain(slot.entry).standing(self.device, tensor)
            if new and known is not None:
                self.counts.saved_storages += 1
                self.counts.dropped_storages += 1
                self.counts.dropped_bytes += known.nbytes
            if known is None:
                self._mismatch(f"{slot.name} is not computed again: {why}")
            return known

    def _stays(self, here: Pass, entry: int) -> None:
        """A chain is over: what was packed in it was counted as dropped, and may turn out to be kept."""
        nbytes, why = here.chain(entry).kept()
        if why:
            self.counts.dropped_storages -= 1
            self.counts.dropped_bytes -= nbytes
            assert here.schedule.plan is not None
            self._mismatch(f"{here.schedule.plan.entries[entry].saved[0]} is not computed again: {why}")

    def _encoded(
        self, here: Pass, frame: Frame, slot: Slot, action: Encode, tensor: torch.Tensor
    ) -> EncodedStorage | None:
        """What stands for a storage of which a code is enough; None where there is no such code for it."""
        with self._lock:
            weak = here.codes.get(slot.entry)
            known = weak() if weak is not None else None
            if known is not None and known.is_of(tensor):
                return known
            windows = windows_of(frame.module, here.pooled.get(slot.entry), tensor.shape)
            why = "another one of its entry was" if weak is not None else ""
            why = why or EncodedStorage.refusal(action.how, tensor, windows)
            if why:
                self._mismatch(f"{slot.name} is not encoded: {why}")
                return None
            made = EncodedStorage(self.device, tensor, action.how, windows)
            here.codes[slot.entry] = weakref.ref(made)
            self.counts.saved_storages += 1
            self.counts.encoded_storages += 1
            self.counts.encoded_bytes += made.nbytes
            code = made.code
            if code is not None:
                self.counts.code_bytes += code.nbytes
                if action.release_at and self._send(here, code, slot.entry):
                    here.add_planned(code, slot.entry)
            return made

    def _mismatch(self, text: str) -> None:
        if len(self.counts.mismatches) < _MOST_MISMATCHES:
            self.counts.mismatches.append(text)

    def _copy(
        self, here: Pass, tensor: torch.Tensor, storage: torch.UntypedStorage, extent: tuple[int, int], entry: int
    ) -> SavedStorage | None:
        """The copy of these bytes; None where host memory is spent."""
        first, nbytes = extent
        version = tensor._version
        with self._lock:
            known = here.copy_of(tensor, storage, first, nbytes)
            if known is not None:
                return known
            self.counts.saved_storages += 1
            saved = SavedStorage(self.device, tensor, first, nbytes)
            if not self._send(here, saved, entry):
                return None
            here.add(storage, version, saved, entry)
            if entry < 0:
                here.release_oldest()
            return saved

    def _send(self, here: Pass, saved: SavedStorage, entry: int) -> bool:
        """Start the copy out; False where host memory is spent."""
        block = here.arena.take(entry, saved.nbytes) if here.arena is not None else None
        if block is None:
            block = self.device.host_block(saved.nbytes)
        if block is None:
            self.counts.host_full += 1
            return False
        saved.offload(block)
        self.counts.offloaded_storages += 1
        self.counts.offloaded_bytes += saved.nbytes
        return True

    def _release(self, here: Pass, entries: list[int]) -> None:
        with self._lock:
            for entry in entries:
                for weak in here.by_entry.get(entry, ()):
                    saved = weak()
                    if saved is not None:
                        saved.release()

    # -- unpack ------------------------------------------------------------------------------------

    def unpack(self, packed: Kept | Marked | Offloaded) -> torch.Tensor:
        """Give back a tensor that autograd saved; may be called again for the same one.

        Raises:
            RuntimeError: it was changed in place since it was saved.
            torch.OutOfMemoryError, DeviceOutOfMemory: no device memory for the bytes to come back to.
        """
        if isinstance(packed, tuple):
            tensor, version = packed
            return tensor if tensor._version == version else restore_kept(packed)
        with self._lock:
            slot = packed.slot
            if isinstance(packed, Offloaded):
                storage = packed.storage
                if isinstance(storage, SavedStorage):
                    self._fetch(packed.owner, storage)
                elif isinstance(storage, EncodedStorage):
                    storage.check_reader()
                    if storage.code is not None:
                        self._fetch(packed.owner, storage.code)
            if slot is not None:
                for entry in slot.prefetch:
                    for weak in packed.owner.by_entry.get(entry, ()):
                        saved = weak()
                        if saved is not None:
                            self._prefetch(saved)
                for entry in slot.arrive:
                    for weak in packed.owner.by_entry.get(entry, ()):
                        saved = weak()
                        if saved is not None:
                            saved.arrive()
            if not isinstance(packed, Offloaded):
                return restore_kept(packed.kept)
            # behind the prefetches: the copies go on while it is made
            if isinstance(packed.storage, RecomputedStorage) and packed.storage.dropped:
                with untransformed():
                    made = packed.storage.make(self.unpack)  # which may make others
                self.counts.recomputed_storages += made
            return packed.restore()

    def _fetch(self, here: Pass, storage: SavedStorage) -> None:
        by_rule = storage.place >= 0
        if storage.prefetch():
            self.counts.fetched_storages += 1
            self.counts.returned_bytes += storage.nbytes
        elif by_rule and storage.state is State.PREFETCHING:
            here.ahead_bytes -= storage.nbytes
        if by_rule:
            self._ahead(here, storage)

    def _prefetch(self, saved: SavedStorage) -> bool:
        """Start a copy back before it is asked for; False where there is no room for it yet."""
        try:
            if saved.prefetch():
                self.counts.prefetched_storages += 1
                self.counts.returned_bytes += saved.nbytes
        except _OUT_OF_MEMORY:
            self.counts.no_room += 1
            return False
        return True

    def _ahead(self, here: Pass, asked: SavedStorage) -> None:
        """By rule: fetch what was saved before the one asked for, newest first, up to a bound of bytes."""
        place = asked.place - 1 if here.next_ahead is None else min(here.next_ahead, asked.place - 1)
        bound = here.schedule.rule.ahead_bytes
        while place >= 0:
            saved = here.order[place]()
            if saved is not None and saved.state is State.ON_HOST:
                if here.ahead_bytes + saved.nbytes > bound or not self._prefetch(saved):
                    break
                here.ahead_bytes += saved.nbytes
            place -= 1
        here.next_ahead = place
