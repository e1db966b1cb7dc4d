"""`SavedStorage`: one storage that autograd saved, on its way to the host and back.

    at pack      compute: ──●record            offload:  wait● copy_out ●record out
    at release   compute: wait out ── drop the device memory
    at prefetch  compute: allocate ●record     prefetch: wait●, wait out, copy_back ●record back
    at unpack    compute: wait back ── use

The objects that autograd holds own it; when the last of them dies, so does the device memory, and the host
block goes back to the pool with the event that its next owner has to wait for.
"""

from __future__ import annotations

import threading

import torch

from vdnn.engine.device import Buffer, Device, Event, HostBlock
from vdnn.engine.lifecycle import State, move

__all__ = ["SavedStorage"]


class SavedStorage:
    """Bytes [first, first + nbytes) of a storage. Every move is made under the lock: autograd has its own threads."""

    __slots__ = (
        "__weakref__",
        "_back",
        "_block",
        "_buffer",
        "_device",
        "_lock",
        "_out",
        "_shift",
        "_stream",
        "first",
        "nbytes",
        "place",
        "state",
    )

    def __init__(self, device: Device, source: torch.Tensor, first: int, nbytes: int) -> None:
        self.first = first
        self.nbytes = nbytes
        self.place = 0  # its number among the storages of the pass, in pack order
        self.state = State.RESIDENT
        self._device = device
        self._buffer: Buffer | None = device.adopt(source, first, nbytes)
        # Some kernels give other bits on another alignment: a restored copy keeps the address modulo this.
        self._shift = (source.untyped_storage().data_ptr() + first) % device.alignment
        self._block: HostBlock | None = None
        self._out: Event | None = None
        self._back: Event | None = None
        self._stream = device.current_stream()
        self._lock = threading.RLock()

    def offload(self) -> bool:
        """Start the copy out. False, and nothing done, where host memory is spent."""
        device = self._device
        with self._lock:
            block = device.host_block(self.nbytes)
            if block is None:
                return False
            assert self._buffer is not None
            written = device.record(device.current_stream())
            device.wait(device.offload_stream, written)
            if block.busy is not None:
                device.wait(device.offload_stream, block.busy)
                block.busy = None
            device.copy_out(block, self._buffer)
            self._out = device.record(device.offload_stream)
            self._block = block
            self.state = move(self.state, State.OFFLOADING)
            return True

    def release(self) -> bool:
        """Compute waits for the copy out, and the device memory goes. False if it was not on its way out."""
        device = self._device
        with self._lock:
            if self.state is not State.OFFLOADING:
                return False
            assert self._buffer is not None
            current = device.current_stream()
            device.wait(current, self._out)
            # made on another stream: that one's allocator must hear of the copy
            device.drop(self._buffer, device.offload_stream if current != self._stream else None)
            self._buffer = None
            self.state = move(self.state, State.ON_HOST)
            return True

    def prefetch(self) -> bool:
        """Start the copy back. False if the bytes are on the device or on their way already."""
        device = self._device
        with self._lock:
            if self.state is not State.ON_HOST:
                return False
            assert self._block is not None
            self._buffer = buffer = device.allocate(self._shift + self.nbytes)
            allocated = device.record(device.current_stream())
            device.wait(device.prefetch_stream, allocated)
            device.wait(device.prefetch_stream, self._out)
            device.copy_back(buffer, self._block, self._shift)
            self._back = device.record(device.prefetch_stream)
            self._stream = device.current_stream()
            self.state = move(self.state, State.PREFETCHING)
            return True

    def arrive(self) -> None:
        """Compute waits for the copy back, if one is on its way."""
        with self._lock:
            if self.state is State.PREFETCHING:
                self._device.wait(self._device.current_stream(), self._back)
                self.state = move(self.state, State.RESIDENT)

    def fetch(self) -> tuple[torch.Tensor, int]:
        """The bytes on the device for the current stream: a flat uint8 tensor, and where they begin in its storage."""
        with self._lock:
            if self.state is State.ON_HOST:
                self.prefetch()
            if self.state is State.PREFETCHING:
                self.arrive()
            elif self._back is not None:
                # another stream than the one that waited first may ask
                self._device.wait(self._device.current_stream(), self._back)
            assert self._buffer is not None
            flat = self._device.use(self._buffer)
            begin = int(flat.storage_offset()) + (self._shift if self._back is not None else 0)
            return flat, begin

    def __del__(self) -> None:
        # In any thread, at any moment: nothing here may wait for another lock than the pool's own queue.
        state = getattr(self, "state", State.RELEASED)
        if state is State.RELEASED:
            return
        device = self._device
        if self._buffer is not None:
            # A copy that nobody waited for may still read or write the memory.
            reader = None
            if state is State.OFFLOADING:
                reader = device.offload_stream
            elif state is State.PREFETCHING:
                reader = device.prefetch_stream
            device.drop(self._buffer, reader)
            self._buffer = None
        if self._block is not None:
            device.give_back(self._block, self._back if self._back is not None else self._out)
            self._block = None
        self.state = move(state, State.RELEASED)
