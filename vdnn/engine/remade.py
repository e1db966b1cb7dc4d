"""`RemadeStorage`: a saved storage whose bytes went and are made again in a buffer, by whatever way the subclass knows.

    at the first unpack   the subclass makes the bytes: `_hold(buffer)`
    at every unpack       `fetch`: the current stream waits for what made them, and gets a view

The objects that autograd holds own it; when the last of them dies, so does the device memory.
"""

from __future__ import annotations

import torch

from vdnn.engine.device import Buffer, Device, Event, Stream
from vdnn.engine.storage import nothing_on, same_counter, typed

__all__ = ["RemadeStorage"]


class RemadeStorage:
    """One storage that is not there between forward and backward. Its owner makes every call under one lock."""

    form = None  # what comes back is bytes
    fresh = False

    __slots__ = ("__weakref__", "_buffer", "_device", "_knows", "_ready", "_version", "_view", "nbytes", "probe")

    def __init__(self, device: Device, source: torch.Tensor) -> None:
        self.nbytes = source.untyped_storage().nbytes()
        # An alias whose data was emptied: it keeps the version counter, and holds no memory.
        self.probe = source.detach()
        self.probe.data = nothing_on(source.device, source.dtype)
        self._device = device
        self._buffer: Buffer | None = None
        self._ready: Event | None = None
        self._knows: Stream = None  # the stream that knows that it was made
        self._view: torch.Tensor | None = None
        self._version = 0

    def counts_as(self, tensor: torch.Tensor) -> bool:
        """Whether a change of the tensor is seen in the version kept here."""
        return same_counter(self.probe, tensor, self.probe._version)

    def _hold(self, buffer: Buffer) -> None:
        """These are the bytes, made on the current stream."""
        self._buffer = buffer
        self._knows = self._device.current_stream()
        self._ready = self._device.record(self._knows)

    def fetch(self, dtype: torch.dtype) -> tuple[torch.Tensor, int, int]:
        """A flat tensor of that dtype over the bytes; where byte 0 is; how often they were changed since."""
        assert self._buffer is not None
        current = self._device.current_stream()
        if current != self._knows:
            self._device.wait(current, self._ready)
            self._knows = current
        flat = self._device.use(self._buffer)
        if self._view is None:
            self._version = flat._version
        if self._view is None or self._view.dtype is not dtype:
            self._view = typed(flat, dtype)
        return self._view, 0, flat._version - self._version

    def __del__(self) -> None:
        buffer = getattr(self, "_buffer", None)
        if buffer is not None:
            self._device.drop(buffer)
