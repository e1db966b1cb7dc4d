"""What the engine asks of a device: streams, events, buffers, copies, host blocks. No decision lives below.

    buffer = device.adopt(tensor, first, nbytes)     bytes that the compute stream has written
    block  = device.host_block(nbytes)               pinned host memory from the pool
    device.wait(device.offload_stream, device.record(device.current_stream()))
    device.copy_out(block, buffer)                   on the offload stream
    done   = device.record(device.offload_stream)
    device.wait(device.current_stream(), done)
    device.drop(buffer)

`CudaDevice` maps each call to one of CUDA's. `VirtualDevice` runs the same calls anywhere and checks
that they are ordered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["Buffer", "Device", "Event", "HostBlock", "Stream", "byte_view", "is_plain"]

Stream = Any
Event = Any


class Buffer:
    """Bytes in device memory. `data` is a flat uint8 tensor, None once dropped; `stream` the one it was made on."""

    __slots__ = ("data", "mark", "stream")

    def __init__(self, data: torch.Tensor, stream: Stream) -> None:
        self.data: torch.Tensor | None = data
        self.stream = stream
        self.mark: Any = None  # the device's own note about the buffer


class HostBlock:
    """Bytes in host memory. `busy` is the event after which the next owner may write them.

    `pin` is whatever keeps the memory page-locked while it lives, None for pageable memory. `lost` hears of the end
    of a block that was taken and never given back (an interrupt may come between any two steps).
    """

    __slots__ = ("busy", "data", "lost", "mark", "nbytes", "pin")

    def __init__(self, data: torch.Tensor, nbytes: int, pin: object | None) -> None:
        self.lost: Callable[[int], None] | None = None
        self.data = data
        self.nbytes = nbytes
        self.pin = pin
        self.busy: Event | None = None
        self.mark: Any = None

    def __del__(self) -> None:
        if self.lost is not None:
            self.lost(self.data.numel())


class Device(Protocol):
    """The calls that the engine makes. Copies and waits are only issued; none of them waits on the host."""

    name: str
    alignment: int

    @property
    def offload_stream(self) -> Stream:
        """The stream that carries copies to the host."""

    @property
    def prefetch_stream(self) -> Stream:
        """The stream that carries copies back."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lives in this device's memory."""

    def current_stream(self) -> Stream:
        """The stream that the caller computes on now; asked anew at every use."""

    def record(self, stream: Stream) -> Event:
        """An event behind everything issued to the stream so far."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Let the stream go on only after the event."""

    def adopt(self, tensor: torch.Tensor, first: int, nbytes: int) -> Buffer:
        """Bytes [first, first + nbytes) of the tensor's storage, written by the current stream."""

    def allocate(self, nbytes: int) -> Buffer:
        """New bytes, allocated on the current stream."""

    def copy_out(self, block: HostBlock, buffer: Buffer) -> None:
        """Issue the copy to the host on the offload stream."""

    def copy_back(self, buffer: Buffer, block: HostBlock, at: int) -> None:
        """Issue the copy to the device, to byte `at` of the buffer, on the prefetch stream."""

    def use(self, buffer: Buffer) -> torch.Tensor:
        """The bytes, for the current stream to read."""

    def drop(self, buffer: Buffer, reader: Stream | None = None) -> None:
        """Let go of the bytes. `reader` names a stream that may still read them."""

    def host_block(self, nbytes: int) -> HostBlock | None:
        """A block of host memory, or None where the host's budget is spent."""

    def give_back(self, block: HostBlock, busy: Event | None) -> None:
        """Return a block to the pool; its next owner waits for `busy`. May be called from any thread."""

    def host_bytes(self) -> tuple[int, int, int]:
        """Host memory: in use now, peak in use, reserved by the pool."""


def byte_view(tensor: torch.Tensor, first: int, nbytes: int) -> torch.Tensor:
    """Bytes [first, first + nbytes) of the tensor's storage, as a flat uint8 tensor that shares them."""
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), first, (nbytes,), (1,))


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is bytes in a storage and nothing else: no subclass, not sparse, not without data."""
    kind = type(tensor)
    return (kind is torch.Tensor or kind is nn.Parameter) and tensor.layout is torch.strided
