"""Bytes: bounds that hold, budgets that are kept, nothing that stays."""

from __future__ import annotations

import copy
import warnings
from types import ModuleType

import torch

from tests.engine.mutation.scenarios.base import (
    by_rule,
    chain,
    expect,
    lives,
    must_raise,
    no_collector,
    same,
    scenario,
    step,
)
from vdnn.errors import DeviceOutOfMemory, UsageError

_WIDTH, _ROWS, _LAYERS = 16, 512, 8
_ONE = 4 * _WIDTH * _ROWS  # bytes of a feature map; the weights are small beside it


@scenario
def a_step_fits_with_offload_and_not_without(engine: ModuleType) -> None:
    model, x = chain(_LAYERS, _WIDTH, _ROWS)
    memory = 7 * _ONE
    with engine.VirtualDevice(memory=memory), must_raise(DeviceOutOfMemory, "out of memory"):
        step(copy.deepcopy(model), x)
    expected = step(copy.deepcopy(model), x)
    device = engine.VirtualDevice(memory=memory)
    engine.wrap_model(model, device, by_rule(engine, max_inflight_bytes=_ONE, ahead_bytes=_ONE))
    with device:
        got = step(model, x)
    engine.unwrap_model(model)
    expect(all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), "wrong gradients")
    expect(_ONE < device.peak_bytes <= memory, f"the account's peak is {device.peak_bytes} bytes of {memory}")


@scenario
def what_left_is_gone_from_the_device(engine: ModuleType) -> None:
    model, x = chain(_LAYERS, _WIDTH, _ROWS)
    device = engine.VirtualDevice()
    with device, no_collector():
        engine.wrap_model(model, device, by_rule(engine, max_inflight_bytes=0, ahead_bytes=0))
        loss = model(x).sum()
        alive = device.account.live_bytes()
        engine.unwrap_model(model)
        expect(alive < 3 * _ONE, f"{alive} bytes are on the device after forward, with feature maps of {_ONE}")
        loss.backward()


@scenario
def a_transpose_that_left_is_gone_too(engine: ModuleType) -> None:
    """It is copied as bytes, a dense tensor as it is: neither holds the memory afterwards."""
    device = engine.VirtualDevice()
    x = torch.randn(8, 16, requires_grad=True)
    for turned in (False, True):
        with no_collector(), engine.offloading(device, engine.Rule(min_bytes=1, max_inflight_bytes=0)):
            y = x * 1
            z = (y.t() if turned else y).square()
            memory = lives(y)
            del y
            device.finish()
            expect(memory.expired(), "a saved tensor that left is still on the device")
            del z


@scenario
def nothing_is_fetched_ahead_where_the_bound_is_nothing(engine: ModuleType) -> None:
    model, x = chain()
    counts = same(model, x, engine.VirtualDevice(), by_rule(engine, max_inflight_bytes=0, ahead_bytes=0), engine)
    expect(counts.fetched_storages > 0, "nothing was fetched")
    expect(counts.prefetched_storages == 0, f"{counts.prefetched_storages} storages were fetched ahead")


@scenario
def a_graph_that_is_dropped_leaves_nothing(engine: ModuleType) -> None:
    """A saved output is not held together with its own node: no collector is needed."""
    everything = engine.Rule(min_bytes=1)
    for rule, budget in ((engine.Rule(min_bytes=1 << 20), None), (everything, 1), (everything, None)):
        device = engine.VirtualDevice(host_budget=budget)
        x = torch.randn(8, 8, requires_grad=True)
        with no_collector(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with engine.offloading(device, rule):
                y = (x * 2).exp()
            memory = lives(y)
            del y
            device.finish()  # a copy that is late holds what it reads
            expect(memory.expired(), "a saved tensor outlives its graph")
            expect(device.host_bytes()[0] == 0, "host memory outlives its graph")


@scenario
def the_host_budget_is_kept(engine: ModuleType) -> None:
    with must_raise(UsageError, "negative"):
        engine.hostpool.HostPool(None, -1)
    model, x = chain(6)
    device = engine.VirtualDevice(host_budget="8KiB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = same(model, x, device, by_rule(engine), engine)
    expect(counts.host_full > 0, "no storage was told that the budget is spent")
    expect(device.host_bytes()[2] <= 8192, f"{device.host_bytes()[2]} bytes are reserved of 8192")


@scenario
def a_buffer_that_is_dropped_lets_go_of_its_memory(engine: ModuleType) -> None:
    device = engine.VirtualDevice()
    buffer = device.allocate(256)
    memory = lives(buffer.data)
    device.drop(buffer)
    expect(memory.expired(), "the memory outlives the drop")
    device.finish()
