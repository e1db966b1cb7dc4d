"""In-place changes: refused exactly where eager refuses them, and never mixed up."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn

from tests.engine.mutation.scenarios.base import expect, must_raise, scenario
from vdnn.values import Entry, Keep, Offload, Plan, SavedName

_CHANGED = "modified by an inplace operation"


@scenario
def a_change_between_pack_and_unpack_raises(engine: ModuleType) -> None:
    for rule in (engine.Rule(min_bytes=1), engine.Rule(min_bytes=1 << 20)):
        x = torch.randn(8, 8, requires_grad=True)
        with engine.offloading(engine.VirtualDevice(), rule):
            y = x * 2
            loss = (y * y).sum()
            y.add_(1)
        with must_raise(RuntimeError, _CHANGED):
            loss.backward()


@scenario
def a_change_of_a_tensor_that_only_marks_a_point_raises(engine: ModuleType) -> None:
    names = [SavedName("", 0, n, "float32", 2, 256) for n in range(4)]
    kept = Entry((names[0], names[1]), 256, Keep())
    moved = Entry((names[2], names[3]), 256, Offload("end #0", f"unpack {names[0]}"))
    plan = Plan("by hand", "two products", 8, "cpu", "", None, (kept, moved), "keep", 1)

    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            kept = x * 2
            return kept, (kept * kept).sum() + (x * 3).square().sum()

    model = Two()
    engine.wrap_model(model, engine.VirtualDevice(), lambda *_: engine.Schedule(plan))
    kept, loss = model(torch.randn(8, 8, requires_grad=True))
    kept.add_(1)
    engine.unwrap_model(model)
    with must_raise(RuntimeError, _CHANGED):
        loss.backward()


@scenario
def two_versions_of_one_storage_are_two_copies(engine: ModuleType) -> None:
    def run() -> list[torch.Tensor]:
        x = torch.linspace(-1, 1, 64).reshape(8, 8).requires_grad_()
        y = x * 2
        first = y * y  # its graph keeps the first version, and is never asked
        y.add_(1)
        second = (y * y).sum()
        (grad,) = torch.autograd.grad(second, x)
        return [grad, first.detach()]

    expected = run()
    with engine.offloading(engine.VirtualDevice(), engine.Rule(min_bytes=1, max_inflight_bytes=0)):
        got = run()
    expect(all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), "wrong gradients")


class _Spoiling(torch.autograd.Function):
    """Changes what it saved in its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        x.add_(1)
        return grad


@scenario
def a_change_of_the_restored_bytes_raises_the_second_time(engine: ModuleType) -> None:
    x = torch.randn(8, 8, requires_grad=True)
    with engine.offloading(engine.VirtualDevice(), engine.Rule(min_bytes=1, max_inflight_bytes=0)):
        y = x * 1
        loss = _Spoiling.apply(y).sum() + (y * y).sum()
        del y
    loss.backward(retain_graph=True)
    with must_raise(RuntimeError, _CHANGED):
        loss.backward()


@scenario
def parts_that_count_their_versions_for_themselves_share_no_copy(engine: ModuleType) -> None:
    """As in the cells of LSTM and GRU: each part is changed and saved after the others, at the same version."""

    def run(x: torch.Tensor) -> torch.Tensor:
        one, two = torch.unsafe_chunk(x * 1, 2, 1)
        one.sigmoid_()
        two.tanh_()
        return torch.autograd.grad((one * two).square().sum(), x)[0]

    x = torch.randn(4, 16, requires_grad=True)
    with engine.offloading(engine.VirtualDevice(), engine.Rule(min_bytes=1)):
        got = run(x)
    expect(torch.equal(got, run(x)), "wrong gradients")


@scenario
def the_trial_of_a_version_counter_leaves_no_trace(engine: ModuleType) -> None:
    one = torch.randn(4)
    same_counter = engine.passes.same_counter
    expect(same_counter(one, one.detach(), one._version), "an alias has the counter of its tensor")
    expect(not same_counter(one, torch.randn(4), one._version), "two tensors have two counters")
    expect(one._version == 0, "a look at a version has changed it")
