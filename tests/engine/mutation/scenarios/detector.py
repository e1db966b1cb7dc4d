"""The race detector itself: it raises for each disorder, and says what is wrong with it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from tests.engine.mutation.scenarios.base import must_raise, scenario
from vdnn.errors import RaceError


def _adopted(engine: ModuleType) -> tuple[Any, Any, Any]:
    """A device, a buffer that compute has written and a host block that nobody has."""
    device = engine.VirtualDevice()
    return device, device.adopt(torch.ones(64), 0, 256), device.host_block(256)


def _follow(device: Any, stream: Any, first: Any) -> None:
    device.wait(stream, device.record(first))


def _copied(engine: ModuleType) -> tuple[Any, Any, Any]:
    """The same, with the copy out behind it and awaited by everybody."""
    device, buffer, block = _adopted(engine)
    _follow(device, device.offload_stream, device.compute_stream)
    device.copy_out(block, buffer)
    for stream in (device.compute_stream, device.prefetch_stream):
        _follow(device, stream, device.offload_stream)
    return device, buffer, block


@scenario
def copied_out_before_it_is_written(engine: ModuleType) -> None:
    device, buffer, block = _adopted(engine)
    with must_raise(RaceError, "reads a saved tensor's memory without waiting for the compute stream"):
        device.copy_out(block, buffer)


@scenario
def a_host_block_written_while_it_is_read(engine: ModuleType) -> None:
    device, _, block = _copied(engine)
    target = device.allocate(256)
    _follow(device, device.prefetch_stream, device.compute_stream)
    device.copy_back(target, block, 0)
    other = device.adopt(torch.ones(64), 0, 256)
    _follow(device, device.offload_stream, device.compute_stream)
    with must_raise(RaceError, "reuses a host block without waiting for the prefetch stream, which still reads it"):
        device.copy_out(block, other)


@scenario
def copied_back_before_it_is_out(engine: ModuleType) -> None:
    device, buffer, block = _adopted(engine)
    _follow(device, device.offload_stream, device.compute_stream)
    device.copy_out(block, buffer)
    target = device.allocate(256)
    _follow(device, device.prefetch_stream, device.compute_stream)
    with must_raise(RaceError, "reads a host block without waiting for the offload stream"):
        device.copy_back(target, block, 0)


@scenario
def copied_back_into_memory_that_compute_still_uses(engine: ModuleType) -> None:
    device, _, block = _copied(engine)
    target = device.allocate(256)
    with must_raise(RaceError, "reuses a restored tensor's memory without waiting for the compute stream"):
        device.copy_back(target, block, 0)


@scenario
def used_before_it_is_back(engine: ModuleType) -> None:
    device, _, block = _copied(engine)
    target = device.allocate(256)
    _follow(device, device.prefetch_stream, device.compute_stream)
    device.copy_back(target, block, 0)
    with must_raise(RaceError, "use: the compute stream reads a restored tensor's memory without waiting"):
        device.use(target)


@scenario
def let_go_while_it_is_read(engine: ModuleType) -> None:
    """The error comes at the next call: memory is mostly let go where nothing can be raised."""
    for late in ("record", "wait", "finish"):
        device, buffer, block = _adopted(engine)
        _follow(device, device.offload_stream, device.compute_stream)
        device.copy_out(block, buffer)
        event = device.record(device.offload_stream)
        device.drop(buffer)
        calls = {
            "record": lambda device=device: device.record(device.compute_stream),
            "wait": lambda device=device, event=event: device.wait(device.compute_stream, event),
            "finish": lambda device=device: device.finish(),
        }
        with must_raise(RaceError, "without waiting for the offload stream, which still reads it"):
            calls[late]()


@scenario
def let_go_while_another_compute_stream_uses_it(engine: ModuleType) -> None:
    device, buffer, _ = _adopted(engine)
    other = engine.virtual.order.Stream("a second compute stream")
    _follow(device, other, device.compute_stream)
    with device.stream(other):
        device.use(buffer)
    device.drop(buffer)  # the allocator was told of the use: nothing is wrong
    device.finish()
