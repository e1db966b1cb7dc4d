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

import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from vdnn.engine.arena import Arena

__all__ = [
    "Buffer",
    "Device",
    "Event",
    "Form",
    "HostBlock",
    "HostUse",
    "Slab",
    "Stream",
    "byte_view",
    "is_plain",
    "over",
]

Stream = Any
Event = Any


class Form(NamedTuple):
    """How a tensor lies in a storage that is all its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Buffer:
    """Bytes in device memory. `data` is a tensor over them, None once dropped; `stream` the one it was made on.

    With a `form` the tensor is of that form; without, it is flat and of bytes. A copy of the one is a copy of the
    other, but the first is the tensor that autograd wants: it need not be built.
    """

    __slots__ = ("data", "form", "mark", "stream")

    def __init__(self, data: torch.Tensor, stream: Stream, form: Form | None = None) -> None:
        self.data: torch.Tensor | None = data
        self.stream = stream
        self.form = form
        self.mark: Any = None  # the device's own note about the buffer


class HostBlock:
    """Bytes in host memory, cut from a slab. `busy` is the event after which the next owner may write them.

    `home` is where the block is while it is free (weakly: it holds the block). `lost` hears of the end of a block that
    was taken and never given back (an interrupt may come between any two steps).
    """

    __slots__ = ("_form", "_view", "busy", "data", "home", "lost", "mark", "nbytes", "slab")

    def __init__(self, slab: Slab, first: int, nbytes: int, home: deque[HostBlock]) -> None:
        self.lost: Callable[[tuple[int, Slab]], None] | None = None
        self.slab = slab
        with _disable_current_modes():  # host memory is not the device's: no account may see it
            self.data = slab.data[first : first + nbytes]
        self.nbytes = nbytes
        self.home = weakref.ref(home)
        self.busy: Event | None = None
        self.mark: Any = None
        self._form: Form | None = None
        self._view: torch.Tensor | None = None

    def view(self, form: Form | None) -> torch.Tensor:
        """Its first `nbytes` in a buffer's form. In a step that repeats itself the form is the last one's."""
        view = self._view
        if view is None or view.nbytes != self.nbytes or (self._form is not form and self._form != form):
            view = self.data[: self.nbytes]
            if form is not None:
                view = view.view(form.dtype).as_strided(form.shape, form.stride)
            self._view, self._form = view, form
        return view

    def __del__(self) -> None:
        if self.lost is not None:
            self.lost((self.data.numel(), self.slab))


class Slab:
    """One piece of host memory.

    `pin` is whatever keeps it page-locked while it lives, None for pageable memory; `gone` hears of its end.
    `spoiled`: a copy may be on its way to bytes of it that nobody has.
    """

    __slots__ = ("data", "gone", "mark", "pin", "spoiled")

    def __init__(self, data: torch.Tensor, pin: object | None, gone: Callable[[tuple[int, bool]], None]) -> None:
        self.gone = gone
        self.data = data
        self.pin = pin
        self.spoiled = False
        self.mark: Any = None  # the device's own note about what was cut from it

    def __del__(self) -> None:
        self.gone((self.data.numel(), self.pin is not None))


class HostUse(NamedTuple):
    """Host memory for offloaded storages, in bytes, and how often memory was asked for from the system."""

    used_bytes: int
    peak_bytes: int
    reserved_bytes: int
    pinned_bytes: int
    allocations: int


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

    def check_open(self) -> None:
        """See that a pass may begin.

        Raises:
            EngineError: copies cannot be issued now.
        """

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lives in this device's memory."""

    def current_stream(self) -> Stream:
        """The stream that the caller computes on now; asked anew at every use."""

    def record(self, stream: Stream) -> Event:
        """An event behind everything issued to the stream so far."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Let the stream go on only after the event."""

    def adopt(
        self, tensor: torch.Tensor, first: int, nbytes: int, stream: Stream = None, form: Form | None = None
    ) -> Buffer:
        """Bytes [first, first + nbytes) of the tensor's storage, written by the current stream.

        `stream` is the current one, here and below, where the caller has just looked it up. With a `form` the bytes
        are the whole storage, and the tensor is of that form: it is taken as it is.
        """

    def allocate(
        self, nbytes: int, stream: Stream = None, form: Form | None = None, like: torch.Tensor | None = None
    ) -> Buffer:
        """New bytes, allocated on the current stream. `like` has the form's dtype, on this device."""

    def copy_out(self, block: HostBlock, buffer: Buffer) -> None:
        """Issue the copy to the host on the offload stream."""

    def copy_back(self, buffer: Buffer, block: HostBlock, at: int) -> None:
        """Issue the copy to the device, to byte `at` of the buffer, on the prefetch stream."""

    def use(self, buffer: Buffer, stream: Stream = None) -> torch.Tensor:
        """The bytes, for the current stream to read."""

    def drop(self, buffer: Buffer, reader: Stream | None = None) -> None:
        """Let go of the bytes. `reader` names a stream that may still read them."""

    def host_block(self, nbytes: int) -> HostBlock | None:
        """A block of host memory, or None where the host's budget is spent."""

    def give_back(self, block: HostBlock, busy: Event | None) -> None:
        """Return a block to the pool; its next owner waits for `busy`. May be called from any thread."""

    def trim(self) -> None:
        """Give host memory that is free back to the system."""

    def host_arena(self) -> Arena:
        """Host memory that is laid out from plans, one at a time."""

    def host_bytes(self) -> HostUse:
        """How much host memory is in use and reserved."""


def byte_view(tensor: torch.Tensor, first: int, nbytes: int) -> torch.Tensor:
    """Bytes [first, first + nbytes) of the tensor's storage, as a flat uint8 tensor that shares them."""
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), first, (nbytes,), (1,))


def over(tensor: torch.Tensor, first: int, nbytes: int, stream: Stream, form: Form | None) -> Buffer:
    """The buffer of these bytes of the tensor's storage."""
    return Buffer(tensor if form is not None else byte_view(tensor, first, nbytes), stream, form)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is bytes in a storage and nothing else: no subclass, not sparse, not without data."""
    kind = type(tensor)
    return (kind is torch.Tensor or kind is nn.Parameter) and tensor.layout is torch.strided
