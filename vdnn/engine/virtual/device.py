"""`VirtualDevice`: the engine's calls on any machine, checked, late and accounted for.

Tensors are CPU tensors, and compute runs at once. Three things stand in for the GPU:

* every copy, use and release is checked to be ordered after what it depends on (`order`);
* copies run late: not when they are issued, but when a stream that waits for them needs them, or by a seeded
  chance before; new memory is poisoned, so a result that is read too early shows in the gradients;
* inside `with device:` an account of device memory is kept, and running out of it raises.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import cast

import torch

from vdnn.engine.arena import Arena
from vdnn.engine.device import Buffer, Form, HostBlock, HostUse, byte_view, over
from vdnn.engine.hostpool import HostPool
from vdnn.engine.virtual.account import MemoryAccount
from vdnn.engine.virtual.order import Event, Execution, History, Stream
from vdnn.errors import RaceError
from vdnn.units import parse_bandwidth, parse_size

__all__ = ["VirtualDevice"]

POISON = 0xFF  # as bytes of a floating dtype: NaN


class _Copy:
    """A copy that was issued and may not have run.

    `tick` is its place on its stream, `after` what its stream knew then. `owner` is the buffer or block that it
    reads from; once that is let go, `poisoned`: the memory may hold anything.
    """

    __slots__ = ("after", "owner", "poisoned", "source", "target", "tick")

    def __init__(
        self, tick: int, after: dict[Stream, int], owner: object, source: torch.Tensor, target: torch.Tensor
    ) -> None:
        self.tick = tick
        self.after = after
        self.owner = owner
        self.source = source
        self.target = target
        self.poisoned = False

    def run(self) -> None:
        """Carry the bytes, whatever they are by now."""
        with torch.no_grad():
            if self.poisoned:
                self.target.fill_(POISON)
            else:
                self.target.copy_(self.source)


class VirtualDevice:
    """A GPU that is not there.

    Args:
        memory: device memory, "2GiB" or bytes; None for no limit. It is enforced inside `with device:`.
        d2h: bandwidth to the host, "12GB/s" or bytes a second; sums up in `link_busy_ns`.
        h2d: bandwidth from the host.
        seed: which late copies run when.
        host_budget: host memory to use at most.
        check: raise RaceError for what is not ordered. Off, a race shows as wrong numbers.

    Raises:
        UsageError: a size or a bandwidth that is none.
    """

    alignment = 64

    def __init__(
        self,
        memory: int | str | None = None,
        d2h: int | str = "12GB/s",
        h2d: int | str = "12GB/s",
        seed: int = 0,
        host_budget: int | str | None = None,
        check: bool = True,
    ) -> None:
        self.name = "virtual"
        self.memory_bytes = None if memory is None else parse_size(memory)
        self.d2h_bytes_per_s = parse_bandwidth(d2h)
        self.h2d_bytes_per_s = parse_bandwidth(h2d)
        self.check = check
        self.offload_stream = Stream("the offload stream")
        self.prefetch_stream = Stream("the prefetch stream")
        self.compute_stream = Stream("the compute stream")
        self.account = MemoryAccount(self.memory_bytes)
        self.copied_out_bytes = 0
        self.copied_back_bytes = 0
        self.races: list[RaceError] = []
        self.execution = Execution()
        self._current = threading.local()
        self._queues: dict[Stream, deque[_Copy]] = {self.offload_stream: deque(), self.prefetch_stream: deque()}
        self._chance = random.Random(seed)
        self._lock = threading.RLock()
        self._pool = HostPool(None, None if host_budget is None else parse_size(host_budget))

    # -- accounting --------------------------------------------------------------------------------

    def __enter__(self) -> VirtualDevice:
        self.account.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.account.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    @property
    def peak_bytes(self) -> int:
        """Most device memory alive at once inside `with device:`, in bytes requested."""
        return self.account.peak_bytes

    @property
    def link_busy_ns(self) -> tuple[int, int]:
        """Time that the copies so far would have kept the link busy: to the host, from the host."""
        return (
            self.copied_out_bytes * 10**9 // self.d2h_bytes_per_s,
            self.copied_back_bytes * 10**9 // self.h2d_bytes_per_s,
        )

    def check_open(self) -> None:
        pass  # no graph is captured here

    # -- streams -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Compute on another stream inside the block, in this thread."""
        before = self.current_stream()
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    def current_stream(self) -> Stream:
        return cast(Stream, getattr(self._current, "stream", self.compute_stream))

    def record(self, stream: Stream) -> Event:
        with self._lock:
            self._raise_races()
            return stream.record()

    def wait(self, stream: Stream, event: Event) -> None:
        with self._lock:
            self._raise_races()
            stream.wait(event)
            if stream not in self._queues:
                self._run_until(event.known)  # compute is never late: what it waits for must run now
            self._dally()

    # -- memory and copies -------------------------------------------------------------------------

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu"

    def adopt(
        self, tensor: torch.Tensor, first: int, nbytes: int, stream: Stream | None = None, form: Form | None = None
    ) -> Buffer:
        with self._lock:
            stream = stream or self.current_stream()
            buffer = over(tensor, first, nbytes, stream, form)
            buffer.mark = History("a saved tensor's memory", stream.issue())
            self.execution.ran(stream, "pack", nbytes)
            return buffer

    def allocate(
        self, nbytes: int, stream: Stream | None = None, form: Form | None = None, like: torch.Tensor | None = None
    ) -> Buffer:
        with self._lock:
            stream = stream or self.current_stream()
            if form is None or like is None:
                data = torch.full((nbytes,), POISON, dtype=torch.uint8, device="cpu")
            else:
                data = like.new_empty_strided(form.shape, form.stride)
                byte_view(data, 0, nbytes).fill_(POISON)
            buffer = Buffer(data, stream, form)
            # whatever the memory held before was used on this stream, up to now
            buffer.mark = History("a restored tensor's memory", stream.issue())
            self.execution.ran(stream, "allocate", nbytes)
            return buffer

    def copy_out(self, block: HostBlock, buffer: Buffer) -> None:
        with self._lock:
            stream = self.offload_stream
            if self.check:
                buffer.mark.check_read(stream, "copy to the host")
                block.mark.check_write(stream, "copy to the host")
            access = stream.issue()
            buffer.mark.reads.append(access)
            block.mark.wrote(access)
            assert buffer.data is not None
            # an alias: who lets go of the tensor may do so by giving it other data
            self._enqueue(stream, access.tick, buffer, buffer.data.detach(), block.view(buffer.form))
            self.copied_out_bytes += block.nbytes

    def copy_back(self, buffer: Buffer, block: HostBlock, at: int) -> None:
        with self._lock:
            stream = self.prefetch_stream
            if self.check:
                block.mark.check_read(stream, "copy back")
                buffer.mark.check_write(stream, "copy back")
            access = stream.issue()
            block.mark.reads.append(access)
            buffer.mark.wrote(access)
            assert buffer.data is not None
            target = buffer.data[at:] if at else buffer.data
            self._enqueue(stream, access.tick, block, block.view(buffer.form), target)
            self.copied_back_bytes += block.nbytes

    def use(self, buffer: Buffer, stream: Stream | None = None) -> torch.Tensor:
        with self._lock:
            current = stream or self.current_stream()
            if self.check:
                buffer.mark.check_read(current, "use")
            if current is not buffer.stream:
                buffer.mark.reads.append(current.issue())
                buffer.mark.keepers.append(current)
            assert buffer.data is not None
            self.execution.ran(current, "use", buffer.data.nbytes)
            return buffer.data

    def drop(self, buffer: Buffer, reader: Stream | None = None) -> None:
        with self._lock:
            if buffer.data is None:
                return
            if reader is not None:
                buffer.mark.keepers.append(reader)
            if self.check:
                try:
                    buffer.mark.check_end()
                except RaceError as race:
                    # memory is mostly let go in a finalizer, where nothing can be raised: the next call does it
                    self.races.append(race)
            if reader is None:
                self._poison_late_copies(buffer)
            buffer.data = None

    def host_block(self, nbytes: int) -> HostBlock | None:
        block = self._pool.take(nbytes)
        if block is not None and block.mark is None:
            self._note(block)
        return block

    def trim(self) -> None:
        self._pool.trim()

    def host_arena(self) -> Arena:
        return Arena(self._pool, self._note)

    def _note(self, block: HostBlock) -> None:
        """Give a block its history, which it shares with the blocks that have bytes in common with it."""
        with self._lock:
            history = block.mark = History("a host block")
            first = block.data.storage_offset()
            end = first + block.data.numel()
            cuts = block.slab.mark = block.slab.mark or []
            for other_first, other_end, other in cuts:
                if other_first < end and first < other_end:
                    history.shares.append(other)
                    other.shares.append(history)
            cuts.append((first, end, history))
            self.account.exclude(block.data)

    def give_back(self, block: HostBlock, busy: Event | None) -> None:
        self._pool.give_back(block, busy)

    def host_bytes(self) -> HostUse:
        return self._pool.sizes()

    # -- late execution ----------------------------------------------------------------------------

    def finish(self) -> None:
        """Run every copy that is still late.

        Raises:
            RaceError: memory was let go too early, and no call since then could say so.
        """
        with self._lock:
            self._raise_races()
            self._run_until({stream: stream.tick for stream in self._queues})

    def _raise_races(self) -> None:
        if self.races:
            race = self.races[0]
            self.races.clear()
            raise race

    def _enqueue(self, stream: Stream, tick: int, owner: object, source: torch.Tensor, target: torch.Tensor) -> None:
        self._queues[stream].append(_Copy(tick, dict(stream.known), owner, source, target))
        self._dally()

    def _run_until(self, ticks: dict[Stream, int]) -> None:
        """Run each side stream up to a tick, and first whatever those copies wait for."""
        for stream, tick in ticks.items():
            queue = self._queues.get(stream)
            while queue and queue[0].tick <= tick:
                copy = queue.popleft()
                self._run_until(copy.after)
                copy.run()
                self.execution.ran(stream, "copy", copy.target.numel())

    def _dally(self) -> None:
        """By a seeded chance, let one late copy run now."""
        waiting = [stream for stream, queue in self._queues.items() if queue]
        if waiting and self._chance.random() < 0.3:
            stream = self._chance.choice(waiting)
            self._run_until({stream: self._queues[stream][0].tick})

    def _poison_late_copies(self, buffer: Buffer) -> None:
        """Copies that have not run yet will find other bytes in this memory."""
        for queue in self._queues.values():
            for copy in queue:
                if copy.owner is buffer:
                    copy.poisoned = True
