"""Whole steps: the same numbers by rule and by plan, and what must never move."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import nn

from tests.engine.mutation.scenarios.base import by_rule, chain, expect, same, scenario, step
from vdnn.values import Entry, Keep, Offload, Plan, SavedName


@scenario
def by_rule_with_everything_late(engine: ModuleType) -> None:
    for seed in range(3):
        model, x = chain()
        rule = by_rule(engine, max_inflight_bytes=1 << 9, ahead_bytes=1 << 11)
        counts = same(model, x, engine.VirtualDevice(seed=seed), rule, engine)
        expect(counts.offloaded_storages == 8, f"{counts.offloaded_storages} storages left in two steps, not 8")
        expect(counts.prefetched_storages > 0, "nothing was fetched ahead")


def _entry(layer: int, action: Keep | Offload) -> Entry:
    """The output of Tanh number `layer`, which the Linear behind it saves, too."""
    names = [SavedName(str(layer), 0, 0, "float32", 2, 512)]
    if layer < 5:
        names.append(SavedName(str(layer + 1), 0, 0, "float32", 2, 512))
    return Entry(tuple(names), 512, action)


def _plan(*entries: Entry) -> Plan:
    return Plan("by hand", "chain", 8, "cpu", "", None, entries, "keep", 1)


@scenario
def by_plan_with_a_planned_wait(engine: ModuleType) -> None:
    """The wait for a copy back stands where the plan puts it, not at the tensor's own unpack."""
    plan = _plan(
        _entry(1, Offload("end 2#0", "unpack 5#0/0", "unpack 4#0/0")),
        _entry(3, Offload("end 4#0", "unpack 5#0/0", "unpack 4#0/0")),
    )
    log: list[str] = []

    class Logged(engine.VirtualDevice):  # type: ignore[name-defined,misc]
        def copy_back(self, buffer, block, at) -> None:  # type: ignore[no-untyped-def]
            log.append("back")
            super().copy_back(buffer, block, at)

        def use(self, buffer, stream=None) -> torch.Tensor:  # type: ignore[no-untyped-def]
            log.append("use")
            return super().use(buffer, stream)

        def wait(self, stream, event) -> None:  # type: ignore[no-untyped-def]
            if stream is self.compute_stream and "back" in log:
                log.append("wait")
            super().wait(stream, event)

    model, x = chain()
    same(model, x, Logged(seed=1), lambda *_: engine.Schedule(plan), engine, steps=1)
    expect(log[:5] == ["back", "back", "wait", "wait", "use"], f"the waits are not where the plan puts them: {log}")


@scenario
def what_belongs_to_the_model_stays(engine: ModuleType) -> None:
    """Parameters, their transposes, buffers; a weight that is made anew for each forward; tensors of other devices."""

    class Anew(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.t()

    seen: set[int] = set()

    class Noting(engine.VirtualDevice):  # type: ignore[name-defined,misc]
        def adopt(self, tensor, *rest):  # type: ignore[no-untyped-def]
            seen.add(tensor.untyped_storage()._cdata)
            return super().adopt(tensor, *rest)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), Anew(), nn.Tanh(), nn.Linear(16, 16))
    fresh = []

    def renew(module: nn.Module, _: object) -> None:
        module._parameters["weight"] = nn.Parameter(torch.full((16, 16), 0.1))
        fresh.append(module._parameters["weight"])

    model[2].register_forward_pre_hook(renew)
    device = Noting()
    engine.wrap_model(model, device, by_rule(engine))
    step(model, torch.randn(8, 16))
    engine.unwrap_model(model)
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *fresh)}
    expect(bool(seen), "nothing was offloaded")
    expect(not own & seen, "a parameter or a buffer was moved")
    with engine.offloading(device, engine.Rule(min_bytes=1)) as off:
        elsewhere = torch.ones(8, 8, device="meta", requires_grad=True)
        (elsewhere * 2).square().sum()
    expect(off.counts.offloaded_storages == 0, "a tensor of another device was moved")


@scenario
def a_view_comes_back_at_its_address_modulo_the_alignment(engine: ModuleType) -> None:
    device = engine.VirtualDevice()
    x = torch.randn(4096, requires_grad=True)
    wide = x * 1
    part = wide[5:105]
    with engine.offloading(device, engine.Rule(min_bytes=1, max_inflight_bytes=0)) as off:
        y = part.square()
    expect(off.counts.offloaded_bytes == 400, "the view was not copied alone")
    saved = y.grad_fn._saved_self  # type: ignore[union-attr]
    expect(saved.data_ptr() % 64 == part.data_ptr() % 64, "it came back on another alignment")
    expect(torch.equal(saved, part), "it came back with other bytes")


@scenario
def an_address_that_is_used_again_is_another_storage(engine: ModuleType) -> None:
    """The copy of a storage outlives it; what lies at its address next is no copy of it, at the same version or not."""
    seen: set[int] = set()
    again = 0

    def run() -> torch.Tensor:
        nonlocal again
        x = torch.linspace(-1, 1, 256).requires_grad_()
        y = x
        for _ in range(100):
            y = y.sigmoid()
            again += y.untyped_storage()._cdata in seen
            seen.add(y.untyped_storage()._cdata)
        (grad,) = torch.autograd.grad(y.sum(), x)
        return grad

    expected = run()
    seen.clear()
    again = 0
    device = engine.VirtualDevice()
    finishing = device.copy_out

    def at_once(block: object, buffer: object) -> None:
        finishing(block, buffer)
        device.finish()  # a copy that is late would hold the memory

    device.copy_out = at_once
    with engine.offloading(device, engine.Rule(min_bytes=1, max_inflight_bytes=0)):
        got = run()
    expect(again > 10, "hardly one of 100 storages lies where another one was: this scenario shows nothing here")
    expect(torch.equal(got, expected), "wrong gradients")


@scenario
def a_tensor_that_was_given_other_memory_is_another_storage(engine: ModuleType) -> None:
    """`.data = …` keeps the version counter, and the new memory may lie where the old one did."""
    w = torch.ones(64, requires_grad=True)
    for _ in range(50):
        tensor = torch.full((64,), 2.0)
        with engine.offloading(engine.VirtualDevice(), engine.Rule(min_bytes=1, max_inflight_bytes=0)):
            first = w * tensor
            address = tensor.untyped_storage()._cdata
            tensor.data = torch.empty(0)
            tensor.data = torch.full((64,), 3.0)
            again = tensor.untyped_storage()._cdata == address
            second = w * tensor
        (gradient,) = torch.autograd.grad(second.sum(), w)
        expect(bool((gradient == 3).all()), "the copy of other memory came back")
        del first
        if again:
            return
    raise AssertionError("no address was used again, so nothing was tried")
