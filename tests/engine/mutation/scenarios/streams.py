"""Several compute streams, graphs that are dropped halfway, copies that fail."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from tests.engine.mutation.scenarios.base import by_rule, chain, expect, must_raise, scenario, step


def _second(engine: ModuleType, device: Any) -> Any:
    """Another compute stream, behind all that was computed so far."""
    stream = engine.virtual.order.Stream("a second compute stream")
    device.wait(stream, device.record(device.current_stream()))
    return stream


def _forward(engine: ModuleType, device: Any, **rule: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A graph of three saved storages, its input, and the gradient that it should give."""
    x = torch.linspace(-1, 1, 64).reshape(8, 8).requires_grad_()
    (expected,) = torch.autograd.grad(x.tanh().sigmoid().exp().sum(), x)
    with engine.offloading(device, engine.Rule(**({"min_bytes": 1, "max_inflight_bytes": 0, "ahead_bytes": 0} | rule))):
        y = x.tanh().sigmoid().exp()
    return y.sum(), x, expected


@scenario
def a_second_backward_on_another_stream(engine: ModuleType) -> None:
    """The bytes came back for the first stream; the second has to wait for the copy itself."""
    device = engine.VirtualDevice()
    loss, x, expected = _forward(engine, device)
    other = _second(engine, device)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    with device.stream(other):
        (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    del loss
    device.finish()
    expect(torch.equal(first, expected) and torch.equal(second, expected), "wrong gradients")


@scenario
def packed_on_one_stream_and_released_on_another(engine: ModuleType) -> None:
    device = engine.VirtualDevice()
    x = torch.randn(8, 8, requires_grad=True)
    with engine.offloading(device, engine.Rule(min_bytes=1, max_inflight_bytes=256, ahead_bytes=0)):
        y = x.tanh()
        with device.stream(_second(engine, device)):
            z = y.sigmoid().exp()
    del y, z
    device.finish()


@scenario
def released_on_one_stream_while_another_fetches(engine: ModuleType) -> None:
    """The second stream knows the first one's work, but not that it has waited for the copy out since."""
    device = engine.VirtualDevice()
    x = torch.linspace(-1, 1, 64).reshape(8, 8).requires_grad_()
    (expected,) = torch.autograd.grad(x.tanh().sum(), x)
    with engine.offloading(device, engine.Rule(min_bytes=1, max_inflight_bytes=256, ahead_bytes=0)):
        y = x.tanh()
        other = _second(engine, device)
        z = y.sigmoid()
    with device.stream(other):
        (got,) = torch.autograd.grad(y.sum(), x)
    expect(torch.equal(got, expected), "wrong gradients")
    del y, z
    device.finish()


@scenario
def dropped_while_copies_are_on_their_way(engine: ModuleType) -> None:
    """Out, and back: the memory goes to the next user, who has to wait."""
    device = engine.VirtualDevice()
    for _ in range(3):
        loss, x, _ = _forward(engine, device, max_inflight_bytes=1 << 20)
        del loss, x
    device.finish()
    for _ in range(3):
        loss, x, _ = _forward(engine, device, ahead_bytes=1 << 20)
        exp = loss.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        assert exp is not None
        _ = exp._saved_result  # type: ignore[attr-defined]  # asked for: the others are fetched ahead
        del loss, x, exp, _
    _forward(engine, device)
    device.finish()
    expect(device.host_bytes()[0] == 0, "host memory is still in use")


@scenario
def a_copy_that_fails(engine: ModuleType) -> None:
    """The copy back may have begun before it failed. What waits for it then: the next owner of either memory."""

    class Failing(engine.VirtualDevice):  # type: ignore[name-defined,misc]
        fails = ""

        def copy_out(self, block, buffer) -> None:  # type: ignore[no-untyped-def]
            super().copy_out(block, buffer)
            self._fail("out")

        def copy_back(self, buffer, block, at) -> None:  # type: ignore[no-untyped-def]
            super().copy_back(buffer, block, at)
            self._fail("back")

        def _fail(self, way: str) -> None:
            if self.fails == way:
                self.fails = ""
                raise OSError(f"the copy {way} fails")

    for way in ("out", "back"):
        for again in (False, True):
            device = Failing()
            for _ in range(2):
                device.fails = "out" if way == "out" else ""
                if way == "out":
                    with must_raise(OSError, "the copy out fails"):
                        _forward(engine, device)
                    continue
                loss, x, expected = _forward(engine, device)
                device.fails = way
                with must_raise(OSError, "the copy back fails"):
                    torch.autograd.grad(loss, x, retain_graph=True)
                if again:
                    (got,) = torch.autograd.grad(loss, x)
                    expect(torch.equal(got, expected), "wrong gradients after a failed copy")
                del loss, x
            device.finish()
            expect(device.host_bytes()[0] == 0, "host memory is still in use after a failed copy")


@scenario
def a_whole_step_on_another_stream(engine: ModuleType) -> None:
    device = engine.VirtualDevice(seed=5)
    model, x = chain()
    expected = step(model, x)
    engine.wrap_model(model, device, by_rule(engine, max_inflight_bytes=1 << 9, ahead_bytes=1 << 10))
    for _ in range(2):
        with device.stream(_second(engine, device)):
            got = step(model, x)
        expect(all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), "wrong gradients")
    engine.unwrap_model(model)
    device.finish()
