"""Late copies, early uses, memory that is used again. The virtual device draws another order for each seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.engine.cases.conftest import EAGER, Ground, equal
from vdnn.engine import Rule, VirtualDevice, offloading

SEEDS = range(6)


class Handing(torch.autograd.Function):
    """Its backward returns a view of a saved tensor, which becomes somebody's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return (x * w).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        return w.view(-1).view_as(w), None


@pytest.mark.case(15)
def test_backward_returns_a_view_of_what_it_was_given(ruled: Ground) -> None:
    def run(x: Tensor) -> tuple[Tensor, ...]:
        w = x.detach() * 3
        y = Handing.apply(x * 1, w) + Handing.apply(x * 1, w * 1)
        return y, *torch.autograd.grad(y, x, retain_graph=True), *torch.autograd.grad(y, x)

    x = torch.randn(16, 16, device=ruled.kind, requires_grad=True)
    with ruled.block():
        ours = run(x)
    assert equal(ours, run(x))


@pytest.mark.case(16)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_keeps_a_view(ruled: Ground, reentrant: bool) -> None:
    kept: list[Tensor] = []

    def part(x: Tensor) -> Tensor:
        y = x.sin()
        kept.append(y[::2])
        return y * y.cos()

    def run(x: Tensor) -> tuple[Tensor, ...]:
        kept.clear()
        y = checkpoint(part, (x * 1).exp(), use_reentrant=reentrant) * 2
        (y * y).sum().backward()
        found = (x.grad.clone(), *(view.detach().clone() for view in kept))
        x.grad = None
        return found

    x = torch.randn(16, 16, device=ruled.kind, requires_grad=True)
    with ruled.block():
        ours = run(x)
    assert equal(ours, run(x))


@pytest.mark.case(17)
@pytest.mark.gpu
@pytest.mark.parametrize("where", ["forward", "backward", "both"])
def test_compute_on_a_stream_of_the_users(where: str) -> None:
    """On the virtual device, test_exploration draws compute streams."""
    from vdnn.engine import CudaDevice

    x = torch.randn(512, 512, device="cuda", requires_grad=True)

    def run(stream: torch.cuda.Stream | None) -> Tensor:
        x.grad = None
        forward = stream if where != "backward" else None
        backward = stream if where != "forward" else None
        torch.cuda.synchronize()
        with torch.cuda.stream(forward):
            torch.cuda._sleep(10_000_000)
            y = x.sin()
            for _ in range(4):
                y = (y @ y).tanh()
            loss = y.sum()
        if forward is not None:
            torch.cuda.current_stream().wait_stream(forward)
        if backward is not None:
            backward.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(backward):
            loss.backward()
        torch.cuda.synchronize()
        return x.grad.clone()

    expected = run(None)
    for _ in range(3):
        with offloading(CudaDevice(), EAGER):
            found = run(torch.cuda.Stream())
        assert torch.equal(found, expected)


@pytest.mark.case(18)
@pytest.mark.parametrize("seed", SEEDS)
def test_offset_views_and_strided_clones(seed: int) -> None:
    x = torch.randn(8, 33, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        y = x * 2
        shifted = y[..., 1:]
        labels = torch.arange(8 * 33).view(8, 33)[..., 1:] % 32
        z = torch.log_softmax(shifted, 1).gather(1, labels) * shifted.t().clone().t()
        return torch.autograd.grad(z.sum(), x)

    with offloading(VirtualDevice(seed=seed), EAGER):
        ours = run()
    assert equal(ours, run())


@pytest.mark.case(19)
def test_backward_asks_while_the_copy_out_is_on_its_way(ruled: Ground) -> None:
    """A gradient inside forward, right after the pack: nothing was released, so nothing comes back."""
    wide = Rule(min_bytes=1, max_inflight_bytes=1 << 30)
    x = torch.randn(32, 32, device=ruled.kind, requires_grad=True)
    with ruled.block(wide) as off:
        y = x * 1
        (ours,) = torch.autograd.grad((y * y).sum(), x)
    assert torch.equal(ours, 2 * x)
    assert off.counts.offloaded_storages
    assert not off.counts.returned_bytes


@pytest.mark.case(20)
def test_large_tensors_that_die_right_after_their_last_use(ruled: Ground) -> None:
    side = 256 if ruled.virtual else 8192
    x = torch.randn(side, side, device=ruled.kind, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        y = x
        for _ in range(4):
            y = y.sigmoid().mul(2)  # each input dies as soon as the next is there
        return torch.autograd.grad(y.sum(), x)

    with ruled.block(Rule(min_bytes=1, max_inflight_bytes=0)):
        ours = run()
    assert equal(ours, run())


@pytest.mark.case(21)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_host_block_that_the_next_step_takes_while_its_copy_back_is_late(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(32, 32), nn.Tanh())])
    x = torch.randn(8, 32)
    device = VirtualDevice(seed=seed)
    reserved = []
    for step in range(4):
        model.zero_grad()
        with offloading(device, EAGER):
            loss = model(x * step).square().sum()
        loss.backward()
        ours = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(x * step).square().sum().backward()
        assert equal(ours, [p.grad for p in model.parameters()])
        del loss
        reserved.append(device.host_bytes()[2])
    assert reserved[0] > 0
    assert reserved[1:] == reserved[:-1]
    device.finish()


@pytest.mark.case(22)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_write_to_a_saved_tensor_while_its_copy_out_is_late(seed: int) -> None:
    """Eager refuses it in backward, so must we. A saved tensor that nobody asks for may change."""
    x = torch.randn(64, 64, requires_grad=True)
    with offloading(VirtualDevice(seed=seed), EAGER):
        y = x * 1
        z = y * y
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
    with offloading(VirtualDevice(seed=seed), EAGER):
        y = x * 1
        dead = y * y
        y.add_(1)
    del dead
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))
