"""`SavedStorage`: one storage that autograd saved, on its way to the host and back.

    at pack      compute: ──●record            offload:  wait● copy_out ●record out
    at release   compute: wait out ── drop the device memory
    at prefetch  compute: allocate ●record     prefetch: wait●, wait out, copy_back ●record back
    at unpack    compute: wait back ── use

The objects that autograd holds own it; when the last of them dies, so does the device memory, and the host
block goes back to the pool with the event that its next owner has to wait for: the end of the copy back. (A
copy out needs none: the next owner's copy out is behind it on the same stream.)

Every call of torch costs the host about as much as all the rest here, so a tensor that is dense and all there is of its
storage has a `form`: its alias is what is copied, and a tensor of the same form is what comes back. Others are bytes.
"""

from __future__ import annotations

import torch

from vdnn.engine.device import Buffer, Device, Event, Form, HostBlock, Stream
from vdnn.engine.lifecycle import State, move

__all__ = ["SavedStorage", "extent", "form_of", "nothing_on", "same_counter", "typed"]

_set_version = torch._C._autograd._unsafe_set_version_counter

_FORMS: dict[Form, Form] = {}  # one object for each, so that comparing them costs nothing
_MOST_FORMS = 1 << 12
_NOTHING: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}  # a tensor without bytes for each of them


class SavedStorage:
    """Bytes [first, first + nbytes) of a storage. Its owner makes every call under one lock."""

    __slots__ = (
        "__weakref__",
        "_back",
        "_begin",
        "_block",
        "_buffer",
        "_device",
        "_out",
        "_shift",
        "_stream",
        "_version",
        "_view",
        "_waited",
        "first",
        "form",
        "fresh",
        "nbytes",
        "place",
        "probe",
        "state",
    )

    def __init__(self, device: Device, source: torch.Tensor, first: int, nbytes: int) -> None:
        self.first = first
        self.nbytes = nbytes
        self.place = -1  # its number among the storages that left by rule; of a planned one -1
        self.fresh = True  # nothing was packed of it yet
        self.state = State.RESIDENT
        self._device = device
        self._block: HostBlock | None = None
        # Some kernels give other bits on another alignment: a restored copy keeps the address modulo this.
        self._shift = (source.untyped_storage().data_ptr() + first) % device.alignment
        self._stream = stream = device.current_stream()  # that this was made on, and packed on
        # It keeps the version counter. Its data is emptied as soon as it must hold no memory.
        self.probe = source.detach()
        self.form = form = None if first or self._shift else form_of(source, nbytes)
        if form is None:
            self.probe.data = nothing_on(source.device, source.dtype)
            self._buffer: Buffer | None = device.adopt(source, first, nbytes, stream)
        else:
            self._buffer = device.adopt(self.probe, first, nbytes, stream, form)
        self._begin = 0  # where byte 0 of the storage would be, in the memory that holds it now
        self._out: Event | None = None
        self._back: Event | None = None
        self._waited: Stream = None  # the stream that knows that the copy back is over
        self._view: torch.Tensor | None = None
        self._version = 0

    def offload(self, block: HostBlock) -> None:
        """Start the copy out, into the block; on the stream that this was made on."""
        device = self._device
        self._block = block
        assert self._buffer is not None
        device.wait(device.offload_stream, device.record(self._stream))
        if block.busy is not None:
            device.wait(device.offload_stream, block.busy)
        self.state = move(self.state, State.OFFLOADING)  # before the copy: if that breaks off, it may be on its way
        device.copy_out(block, self._buffer)
        self._out = device.record(device.offload_stream)

    def release(self) -> bool:
        """Compute waits for the copy out, and the device memory goes. False if it was not on its way out."""
        if self.state is not State.OFFLOADING:
            return False
        device, buffer = self._device, self._buffer
        assert buffer is not None
        current = device.current_stream()
        device.wait(current, self._out)
        self.state = move(self.state, State.ON_HOST)
        self._buffer = self._view = None
        # made on another stream: that one's allocator must hear of the copy
        device.drop(buffer, device.offload_stream if current != buffer.stream else None)
        if self.form is not None:
            self.probe.data = nothing_on(self.probe.device, self.form.dtype)
        return True

    def prefetch(self) -> bool:
        """Start the copy back. False if the bytes are on the device or on their way already.

        Raises:
            torch.OutOfMemoryError, DeviceOutOfMemory: no room. The host has the bytes, and it may be tried again.
        """
        if self.state is not State.ON_HOST:
            return False
        device, block = self._device, self._block
        assert block is not None
        stream = device.current_stream()
        buffer = device.allocate(self._shift + self.nbytes, stream, self.form, self.probe)
        device.wait(device.prefetch_stream, device.record(stream))
        device.wait(device.prefetch_stream, self._out)
        try:
            device.copy_back(buffer, block, self._shift)
            self._back = device.record(device.prefetch_stream)
        except BaseException:
            # the copy may be on its way: whoever takes the memory or the block next has to wait for it
            device.drop(buffer, device.prefetch_stream)
            self._back = device.record(device.prefetch_stream)
            raise
        self._buffer = buffer
        self._begin = self._shift - self.first
        self._waited = None
        self.state = move(self.state, State.PREFETCHING)
        return True

    def arrive(self) -> None:
        """Compute waits for the copy back, if one is on its way."""
        if self.state is State.PREFETCHING:
            self._wait(self._device.current_stream())
            self.state = move(self.state, State.RESIDENT)

    def _wait(self, stream: Stream) -> None:
        self._device.wait(stream, self._back)
        self._waited = stream

    def fetch(self, dtype: torch.dtype) -> tuple[torch.Tensor, int, int]:
        """The bytes on the device for the current stream.

        Returns: a tensor of that dtype over the memory that holds them, of the storage's form if it has one; where
        byte 0 of the storage would be in that memory; and how often they were changed in place since they came back,
        through a tensor restored from them.
        """
        if self.state is State.ON_HOST:
            self.prefetch()
        current = self._device.current_stream()
        if self.state is State.PREFETCHING:
            self._wait(current)
            self.state = move(self.state, State.RESIDENT)
        elif self._back is not None and current != self._waited:
            self._wait(current)
        assert self._buffer is not None
        bytes_ = self._device.use(self._buffer, current)
        view = self._view
        if view is None:
            self._version = bytes_._version
        if view is None or view.dtype is not dtype:
            self._view = view = typed(bytes_, dtype)
        return view, self._begin, bytes_._version - self._version

    def __del__(self) -> None:
        # In any thread, at any moment: nothing here may wait for another lock than the pool's own queue.
        state = getattr(self, "state", State.RELEASED)
        if state is State.RELEASED:
            return
        self.state = move(state, State.RELEASED)
        device, buffer, block = self._device, getattr(self, "_buffer", None), self._block
        if buffer is not None:
            # A copy that nobody waited for may still read or write the memory.
            reader = None
            if state is State.OFFLOADING:
                reader = device.offload_stream
            elif state is State.PREFETCHING:
                reader = device.prefetch_stream
            device.drop(buffer, reader)
        if block is not None:
            device.give_back(block, self._back)


def nothing_on(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without bytes, the same one for each device and dtype."""
    nothing = _NOTHING.get((device, dtype))
    if nothing is None:
        nothing = _NOTHING[device, dtype] = torch.empty(0, device=device, dtype=dtype)
    return nothing


def form_of(tensor: torch.Tensor, nbytes: int) -> Form | None:
    """How the tensor lies in its storage of `nbytes`, if it is dense and all there is of it."""
    if tensor.nbytes != nbytes or tensor.storage_offset() or tensor.is_conj() or tensor.is_neg():
        return None
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        key = (tensor.shape, tensor.stride(), tensor.dtype)
        form: Form | None = _FORMS.get(key)  # type: ignore[call-overload]
        if form is None:
            if len(_FORMS) >= _MOST_FORMS:
                _FORMS.clear()  # shapes that never come again; equal forms that are two objects do no harm
            form = Form(*key)
            _FORMS[form] = form
        return form
    return None


def typed(flat: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes read as another dtype, with the same version counter wherever whole elements fill them."""
    if flat.dtype is dtype:
        return flat
    if flat.dtype is not torch.uint8 or flat.dim() != 1:
        flat = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)
    size = dtype.itemsize
    if flat.numel() % size == 0 and flat.storage_offset() % size == 0:
        return flat.view(dtype)
    return torch.empty(0, dtype=dtype, device=flat.device).set_(flat.untyped_storage())


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
