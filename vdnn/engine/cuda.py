"""`CudaDevice`: the engine's calls, each mapped to one of CUDA's.

Buffers that receive a copy are allocated on the compute stream: the caching allocator hands a freed block
only to the stream that it was allocated on, so a block that a side stream allocated could never serve
compute again. The side stream therefore waits for the compute stream before it writes.

What torch does below these calls, and where they may lose time: docs/cuda.md.
"""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial
from typing import SupportsInt

import torch

from vdnn.engine.arena import Arena
from vdnn.engine.device import Buffer, Form, HostBlock, HostUse, over
from vdnn.engine.hostlimit import default_host_budget
from vdnn.engine.hostpool import HostPool
from vdnn.errors import EngineError, UsageError

__all__ = ["CudaDevice"]


class CudaDevice:
    """A real GPU.

    Args:
        index: which one; None for the current.
        host_budget_bytes: reserve no more pinned memory than this; None for what the machine, the container and
            the process have to spare, shared with the other ranks of the node.

    Raises:
        UsageError: there is no CUDA device, or not that many.
    """

    alignment = 512

    def __init__(self, index: int | None = None, host_budget_bytes: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise UsageError("no CUDA device here: use a virtual device (vdnn.VirtualDevice, --device virtual)")
        index = torch.cuda.current_device() if index is None else index
        if not 0 <= index < torch.cuda.device_count():
            raise UsageError(f"no cuda:{index}: this machine has {torch.cuda.device_count()} CUDA devices")
        self._index = index
        self.torch_device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(index)
        self.offload_stream = torch.cuda.Stream(self.torch_device)
        self.prefetch_stream = torch.cuda.Stream(self.torch_device)
        budget = default_host_budget() if host_budget_bytes is None else host_budget_bytes
        # not a bound method: the pool would hold the device, which holds the pool, and the memory would stay pinned
        self._pool = HostPool(partial(_pin, self.torch_device), budget)

    def check_open(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise EngineError(
                "a wrapped model was called while a CUDA graph is captured: its copies wait for those of the step "
                "before, which are not in the graph. Capture the model without offload (vdnn.unwrap)"
            )

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.device == self.torch_device

    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._index)

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event: torch.cuda.Event = stream.record_event()
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def adopt(
        self,
        tensor: torch.Tensor,
        first: int,
        nbytes: int,
        stream: torch.cuda.Stream | None = None,
        form: Form | None = None,
    ) -> Buffer:
        return over(tensor, first, nbytes, stream or self.current_stream(), form)

    def allocate(
        self,
        nbytes: int,
        stream: torch.cuda.Stream | None = None,
        form: Form | None = None,
        like: torch.Tensor | None = None,
    ) -> Buffer:
        if form is None or like is None:
            data = torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
        else:
            data = like.new_empty_strided(form.shape, form.stride)
        return Buffer(data, stream or self.current_stream(), form)

    def copy_out(self, block: HostBlock, buffer: Buffer) -> None:
        assert buffer.data is not None
        self._copy(self.offload_stream, block.view(buffer.form), buffer.data)

    def copy_back(self, buffer: Buffer, block: HostBlock, at: int) -> None:
        assert buffer.data is not None
        self._copy(self.prefetch_stream, buffer.data[at:] if at else buffer.data, block.view(buffer.form))

    def _copy(self, stream: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        if torch.cuda.current_device() != self._index:
            with torch.cuda.stream(stream):  # sets the current device back, too
                target.copy_(source, non_blocking=True)
            return
        # as `torch.cuda.stream` does it, without asking again for what is known: half the time of the whole call
        before = self.current_stream()
        torch.cuda.set_stream(stream)
        try:
            target.copy_(source, non_blocking=True)
        finally:
            torch.cuda.set_stream(before)

    def use(self, buffer: Buffer, stream: torch.cuda.Stream | None = None) -> torch.Tensor:
        assert buffer.data is not None
        current = stream or self.current_stream()
        if current != buffer.stream:
            # made on another stream: its block must not be handed out while this one still reads
            buffer.data.record_stream(current)
        return buffer.data

    def drop(self, buffer: Buffer, reader: torch.cuda.Stream | None = None) -> None:
        if buffer.data is not None and reader is not None:
            buffer.data.record_stream(reader)
        buffer.data = None

    def host_block(self, nbytes: int) -> HostBlock | None:
        return self._pool.take(nbytes)

    def give_back(self, block: HostBlock, busy: torch.cuda.Event | None) -> None:
        self._pool.give_back(block, busy)

    def trim(self) -> None:
        self._pool.trim()

    def host_arena(self) -> Arena:
        return Arena(self._pool)

    def host_bytes(self) -> HostUse:
        return self._pool.sizes()


def _pin(device: torch.device, data: torch.Tensor) -> _Pin | None:
    """Page-lock the tensor's memory in place, for as long as the pin lives; None if the driver refuses."""
    with torch.cuda.device(device):  # else the runtime makes a context on whatever device is current
        pinned = _succeeded(torch.cuda.cudart().cudaHostRegister(data.data_ptr(), data.numel(), 0))
    return _Pin(data, device) if pinned else None


def _succeeded(status: SupportsInt) -> bool:
    """Whether a call of the CUDA runtime did.

    A refusal stays the thread's last error until somebody takes it, and torch takes it at its next launch of a kernel,
    whose failure it then seems to be. So a kernel that does nothing is launched here.
    """
    if int(status) == 0:
        return True
    with contextlib.suppress(RuntimeError):
        torch.cuda._sleep(1)
    return False


class _Pin:
    """Unpins the memory before it is freed; a copy may still be on its way, so it waits for the device."""

    def __init__(self, data: torch.Tensor, device: torch.device) -> None:
        self._data = data
        self._device = device
        self._process = os.getpid()

    def __del__(self) -> None:
        if sys.is_finalizing() or os.getpid() != self._process:
            return  # the driver unpins by itself when the process ends; in a forked one nothing is pinned
        with torch.cuda.device(self._device):
            with contextlib.suppress(RuntimeError):  # of a device that has failed nothing is on its way
                torch.cuda.synchronize(self._device)
            _succeeded(torch.cuda.cudart().cudaHostUnregister(self._data.data_ptr()))
