"""What autograd lets people do with a graph."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from tests.engine.cases.conftest import EAGER, Ground, equal
from vdnn.engine import VirtualDevice, offloading
from vdnn.errors import EngineError


def chain(x: Tensor) -> Tensor:
    return ((x * 1).sin() * (x * 2).exp()).tanh()


@pytest.mark.case(34)
@pytest.mark.parametrize("times", [2, 3])
def test_backward_more_than_once(ruled: Ground, times: int) -> None:
    x = torch.randn(16, 16, device=ruled.kind, requires_grad=True)

    def run() -> list[Tensor]:
        y = chain(x).sum()
        return [torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(times)]

    with ruled.block():
        ours = run()
    assert equal(ours, run())
    gc.collect()
    ruled.nothing_left()


@pytest.mark.case(35)
@pytest.mark.parametrize("inside", [True, False])
def test_gradients_of_gradients_with_the_block_open_or_closed(ruled: Ground, inside: bool) -> None:
    x = torch.randn(4, 4, device=ruled.kind, dtype=torch.double, requires_grad=True)

    def second(y: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    with ruled.block():
        y = chain(x).sum()
        ours = second(y) if inside else None
    ours = second(y) if ours is None else ours
    assert torch.equal(ours, second(chain(x).sum()))
    with ruled.block():
        assert torch.autograd.gradcheck(chain, (x,))
        assert torch.autograd.gradgradcheck(chain, (x,))


@pytest.mark.case(36)
def test_a_nodes_saved_tensors_can_be_looked_at_twice(ruled: Ground) -> None:
    x = torch.randn(16, 16, device=ruled.kind, requires_grad=True)
    with ruled.block():
        y = x.exp()
        z = y.sin()
    for _ in range(2):
        assert torch.equal(z.grad_fn._saved_self, y)
    assert torch.equal(*torch.autograd.grad(z.sum(), x), x.exp().cos() * x.exp())


def _base(y: Tensor) -> None:
    y.add_(1)


def _view(y: Tensor) -> None:
    y[0].add_(1)


def _out(y: Tensor) -> None:
    with torch.no_grad():
        torch.add(y, 1, out=y)


def _foreach(y: Tensor) -> None:
    with torch.no_grad():
        torch._foreach_add_([y], 1)


@pytest.mark.case(37)
@pytest.mark.parametrize("change", [_base, _view, _out, _foreach])
def test_a_change_in_place_raises_as_in_eager(ruled: Ground, change) -> None:
    x = torch.randn(16, 16, device=ruled.kind, requires_grad=True)

    def run() -> None:
        y = x * 1
        z = y * y
        change(y)
        z.sum().backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run()
    with ruled.block(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run()


@pytest.mark.case(37)
def test_one_tensor_at_two_versions_is_two_values(ruled: Ground) -> None:
    x = torch.randn(16, 16, device=ruled.kind, requires_grad=True)

    def run(first: bool) -> Tensor:
        y = (x * 1).detach()
        a = x * y
        with torch.no_grad():
            y.mul_(2)
        b = x * y
        return torch.autograd.grad((a if first else b).sum(), x)[0]

    with ruled.block():
        assert torch.equal(run(False), run(False))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(True)


@pytest.mark.case(38)
@pytest.mark.parametrize("how", ["outside", "thread", "subset", "part"])
def test_backward_somewhere_else(ruled: Ground, how: str) -> None:
    x, w = (torch.randn(16, 16, device=ruled.kind, requires_grad=True) for _ in range(2))

    def forward() -> tuple[Tensor, Tensor]:
        h = chain(x) @ w
        return h.sin().sum(), h.cos().sum()

    def backward(one: Tensor, two: Tensor) -> list[Tensor]:
        if how == "subset":
            return list(torch.autograd.grad(one, w))
        if how == "part":
            return [*torch.autograd.grad(two, (x, w), retain_graph=True), *torch.autograd.grad(one, (x, w))]
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(one + two, (x, w))))
        if how == "thread":
            thread.start()
            thread.join()
            return found
        return list(torch.autograd.grad(one + two, (x, w)))

    with ruled.block():
        results = forward()
    ours = backward(*results)
    del results
    assert equal(ours, backward(*forward()))
    ruled.nothing_left()


@pytest.mark.case(39)
def test_a_hundred_graphs_that_are_dropped_leave_nothing() -> None:
    device = VirtualDevice()
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
    with device:
        for number in range(100):
            with offloading(device, EAGER):
                loss = model(torch.randn(8, 32)).sum()
            del loss
            device.finish()
            found = device.account.live_bytes(), device.host_bytes()
            if number == 1:
                first = found
            assert number < 1 or found == first
    assert first[1][0] == 0


class Forked(nn.Module):
    """One of its two branches runs, another each step; the other is computed, and not used."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor, which: int) -> Tensor:
        unused = self.branches[1 - which](x.sin())
        assert unused.requires_grad
        return self.branches[which](x.cos()) * 2


@pytest.mark.case(40)
def test_a_branch_that_is_not_used(ground: Ground) -> None:
    def step(model: nn.Module, number: int) -> list[Tensor]:
        model.zero_grad()
        out = model(torch.randn(8, 16, device=ground.kind), number % 2)
        out.square().sum().backward()
        return [out]

    ground.same(Forked, step, steps=4)
    ground.nothing_left()


@pytest.mark.case(41)
def test_evaluation_between_steps(ground: Ground) -> None:
    def step(model: nn.Module, number: int) -> list[Tensor]:
        x = torch.randn(8, 16, device=ground.kind)
        model.eval()
        with torch.no_grad():
            first = model(x)
        with torch.inference_mode():
            second = model(x).clone()
        model.train()
        out = model(x)
        out.square().sum().backward()
        return [first, second, out]

    make = lambda: nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))  # noqa: E731
    ground.same(make, step, steps=3)


@pytest.mark.case(43)
def test_one_block_inside_itself_is_refused_and_two_blocks_nest(ruled: Ground) -> None:
    x = torch.randn(16, 16, device=ruled.kind, requires_grad=True)
    block = ruled.block()
    with block, pytest.raises(EngineError, match="open already"):
        block.__enter__()
    with ruled.block(), ruled.block() as inner:
        y = chain(x).sum()
    assert inner.counts.offloaded_storages
    assert equal(torch.autograd.grad(y, x), torch.autograd.grad(chain(x).sum(), x))


@pytest.mark.case(44)
@pytest.mark.parametrize("order", ["inside", "around"])
def test_with_save_on_cpu(ruled: Ground, order: str) -> None:
    x = torch.randn(16, 16, device=ruled.kind, requires_grad=True)
    first, second = ruled.block(), torch.autograd.graph.save_on_cpu()
    if order == "around":
        first, second = second, first
    with first:
        a = chain(x)
        with second:
            b = chain(a)
        c = chain(b).sum()
    assert equal(torch.autograd.grad(c, x), torch.autograd.grad(chain(chain(chain(x))).sum(), x))


@pytest.mark.case(44)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inputs", ["positional", "keyword", "list", "closure"])
def test_with_checkpoint_inside(ruled: Ground, reentrant: bool, inputs: str) -> None:
    x = torch.randn(16, 16, device=ruled.kind, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        h = (x * 1).sin()
        if inputs == "positional":
            y = checkpoint(chain, h, use_reentrant=reentrant)
        elif inputs == "keyword" and not reentrant:
            y = checkpoint(chain, x=h, use_reentrant=False)
        elif inputs == "list" and not reentrant:
            y = checkpoint(lambda parts: chain(parts[0]), [h], use_reentrant=False)
        elif not reentrant:
            y = checkpoint(lambda: chain(h), use_reentrant=False)
        else:
            # what the reentrant kind does not see as an argument gets no gradient: that is its own rule
            y = checkpoint(chain, h, use_reentrant=True)
        y.square().sum().backward()
        found = x.grad.clone()
        x.grad = None
        return (found,)

    with ruled.block() as off:
        ours = run()
    assert equal(ours, run())
    assert off.counts.offloaded_storages


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3))

    def forward(self, x: Tensor, reentrant: bool) -> Tensor:
        return checkpoint(self.body, x * 1, use_reentrant=reentrant)


@pytest.mark.case(44)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_that_checkpoints_itself(ground: Ground, reentrant: bool) -> None:
    """Its batch norm is updated twice a step, as without offload."""

    def step(model: nn.Module, number: int) -> list[Tensor]:
        x = torch.randn(8, 16, device=ground.kind, requires_grad=True)
        out = model(x, reentrant)
        out.square().sum().backward()
        return [out, x.grad]

    ground.same(Norm, step)


@pytest.mark.case(44)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_a_wrapped_model(ground: Ground, reentrant: bool) -> None:
    def step(model: nn.Module, number: int) -> list[Tensor]:
        model.zero_grad()
        x = torch.randn(8, 16, device=ground.kind, requires_grad=True)
        out = checkpoint(model, x, use_reentrant=reentrant)
        out.square().sum().backward()
        return [out, x.grad]

    make = lambda: nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 16))  # noqa: E731
    # both kinds recompute in a forward of the model, which is a pass as any other
    ground.same(make, step)
    ground.nothing_left()


class Product(torch.autograd.Function):
    """Saves an input, an output, and a tensor of the CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        out = x * y
        ctx.save_for_backward(x, out, torch.tensor([2.0]))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, out, two = ctx.saved_tensors
        assert two.device.type == "cpu"
        return grad * out / x, grad * x * two.item() / 2


@pytest.mark.case(45)
def test_a_function_of_the_users(ruled: Ground) -> None:
    x, y = (torch.randn(16, 16, device=ruled.kind, requires_grad=True) for _ in range(2))

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(Product.apply(x * 2, y * 3).sum(), (x, y))

    with ruled.block():
        ours = run()
    assert equal(ours, run())


@pytest.mark.case(46)
def test_a_wrapper_subclass_passes_through(ruled: Ground) -> None:
    """Its bytes are elsewhere, and mean what its class says."""
    parts = [torch.randn(16, 16, device=ruled.kind) for _ in range(2)]
    x = TwoTensor(*parts).requires_grad_()
    with ruled.block() as off:
        y = (x * 1).exp().sum()
    assert off.counts.packs == 1
    assert off.counts.offloaded_storages == 0
    (gradient,) = torch.autograd.grad(y, x)
    assert equal([gradient.a, gradient.b], [part.exp() for part in parts])


@pytest.mark.case(48)
def test_a_wrapped_model_dies_by_reference_count_alone(ground: Ground) -> None:
    gc.collect()
    gc.disable()
    try:
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh()).to(ground.kind)
        ground.wrap(model)
        for _ in range(2):
            model(torch.randn(4, 16, device=ground.kind)).sum().backward()
        dead = weakref.ref(model)
        ground.models.clear()
        del model
        assert dead() is None
    finally:
        gc.enable()


@pytest.mark.case(46)
def test_transforms_of_torch_func_are_refused(ground: Ground) -> None:
    model = ground.wrap(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()).to(ground.kind))
    x = torch.randn(4, 8, device=ground.kind)
    for transformed in (torch.func.vmap(model), torch.func.grad(lambda y: model(y).sum())):
        with pytest.raises(EngineError, match=r"inside a transform of torch\.func"):
            transformed(x)
    with torch.no_grad():
        assert torch.func.vmap(model)(x).shape == x.shape
    model(x).sum().backward()  # and the next step works
    assert ground.offloader(model).counts.offloaded_storages
