"""`CudaDevice` on a CUDA that only writes down what is asked of it: every call is handed on, in order, and no other."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.engine.mutation.scenarios.base import expect, lives, no_collector, scenario


class _Event:
    def __init__(self, known: dict[str, int]) -> None:
        self.known = known


class _Stream:
    def __init__(self, cuda: _Cuda, name: str) -> None:
        self.name = name
        self._cuda = cuda
        self._events = 0

    def record_event(self) -> _Event:
        self._events += 1
        self._cuda.log.append(f"record on {self.name}")
        return _Event({self.name: self._events})

    def wait_event(self, event: _Event) -> None:
        self._cuda.log.append(f"{self.name} waits for {event.known}")


class _Cuda:
    """As much of `torch.cuda` as `CudaDevice` asks for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.made = 0
        self.index = 0
        self.capturing = False
        self.now = _Stream(self, "compute")
        self.cudart = lambda: self

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def device(self, _: object) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def current_device(self) -> int:
        return self.index

    def get_device_name(self, _: object) -> str:
        return "a pretended GPU"

    def Stream(self, _: object) -> _Stream:
        self.made += 1
        return _Stream(self, f"side {self.made}")

    def current_stream(self, _: object) -> _Stream:
        return self.now

    def set_stream(self, stream: _Stream) -> None:
        self.now = stream
        self.log.append(f"on {stream.name}")

    @contextlib.contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        self.log.append(f"inside {stream.name}")
        try:
            yield
        finally:
            self.now = before

    def synchronize(self, _: object) -> None:
        self.log.append("synchronize")

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.log.append(f"register {nbytes}")
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.log.append("unregister")
        return 0


@contextlib.contextmanager
def _pretended(engine: ModuleType) -> Iterator[tuple[Any, _Cuda]]:
    """A `CudaDevice` whose device memory is the host's."""
    cuda = _Cuda()
    pretended = SimpleNamespace(**{name: getattr(torch, name) for name in ("empty", "uint8", "Tensor")})
    pretended.cuda, pretended.device = cuda, lambda *_: torch.device("cpu")

    def record_stream(_: torch.Tensor, stream: _Stream) -> None:
        cuda.log.append(f"{stream.name} uses memory")

    sys.modules["vdnn.engine.cuda"].torch = pretended  # for good: the module is thrown away after the scenario
    with mock.patch.object(torch.Tensor, "record_stream", record_stream):
        yield engine.CudaDevice(host_budget_bytes=1 << 20), cuda


def _logged(cuda: _Cuda, *lines: str) -> None:
    expect(cuda.log == list(lines), f"CUDA was asked for {cuda.log}, not for {list(lines)}")
    cuda.log.clear()


@scenario
def no_pass_begins_while_a_graph_is_captured(engine: ModuleType) -> None:
    with _pretended(engine) as (device, cuda):
        cuda.capturing = True
        try:
            with engine.offloading(device, engine.schedule.Rule()):
                raise AssertionError("a pass began")
        except Exception as error:
            expect(type(error).__name__ == "EngineError", f"{type(error).__name__}: {error}")


@scenario
def every_call_is_one_of_cudas(engine: ModuleType) -> None:
    with _pretended(engine) as (device, cuda), no_collector():
        compute, other = cuda.now, _Stream(cuda, "other")
        event = device.record(device.current_stream())
        expect(event.known == {"compute": 1}, "what came back is not the event that was recorded")
        device.wait(device.offload_stream, event)
        _logged(cuda, "record on compute", "side 1 waits for {'compute': 1}")

        block = device.host_block(256)
        _logged(cuda, "register 4096")
        source, target = device.adopt(torch.arange(64.0), 0, 256), device.allocate(256)
        device.copy_out(block, source)
        device.copy_back(target, block, 0)
        _logged(cuda, "on side 1", "on compute", "on side 2", "on compute")
        cuda.index = 1  # another device is the current one: it must be so afterwards, too
        device.copy_out(block, source)
        _logged(cuda, "inside side 1")
        cuda.index = 0
        expect(torch.equal(device.use(target), source.data), "the copy back has other bytes")
        _logged(cuda)

        cuda.now = other
        device.use(target)
        cuda.now = compute
        _logged(cuda, "other uses memory")

        memory = lives(target.data)
        device.drop(target, device.prefetch_stream)
        _logged(cuda, "side 2 uses memory")
        expect(memory.expired(), "a dropped buffer holds its memory")
        memory = lives(source.data)
        device.drop(source)
        _logged(cuda)
        expect(memory.expired(), "a dropped buffer holds its memory")

        device.give_back(block, event)
        again = device.host_block(256)
        expect(again.busy is event, "a block comes from the pool without the event of its last use")
        device.give_back(again, None)
        del block, again, device
        _logged(cuda, "synchronize", "unregister")
