"""Code that backward must meet halfway: custom functions, checkpoints, hooks, RNNs, autocast inside the model."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests.tracing.test_beside_real import Names
from vdnn.errors import CaptureError
from vdnn.tracing import capture_model

needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="a CPU-only torch has no fake CUDA tensors")


class Scaled(torch.autograd.Function):
    """Tensor and plain arguments mixed, an attribute on the context, an output without gradient."""

    @staticmethod
    def forward(ctx: Any, factor: float, x: torch.Tensor, name: str, y: torch.Tensor) -> Any:
        ctx.save_for_backward(x, y)
        ctx.factor = factor
        return x * y * factor, x + 1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, other: torch.Tensor) -> Any:
        x, y = ctx.saved_tensors
        return None, grad * y * ctx.factor + other, None, grad * x


class Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> Any:
        ctx.set_materialize_grads(False)
        return x * 2, x * 3

    @staticmethod
    def backward(ctx: Any, first: torch.Tensor | None, second: torch.Tensor | None) -> Any:
        assert second is None
        assert first is not None
        return first * 2


class Net(nn.Module):
    def __init__(self, function: Callable[[nn.ModuleList, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.layers, x)


def hooked(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    y = layers[0](x)
    y.register_hook(lambda grad: grad * 2)
    z = layers[1](y)
    z.grad_fn.register_hook(lambda given, came: tuple(g if g is None else g.neg() for g in given))
    w = z.relu()
    w.grad_fn.register_prehook(lambda came: (came[0].exp(),))
    w.retain_grad()
    return layers[2](w)


def penalty(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    y = layers[1](layers[0](x).tanh())
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y + grad.square()


def with_hooks_on_modules() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].register_full_backward_hook(lambda module, given, came: None)
    model[1].register_full_backward_hook(lambda module, given, came: (given[0].sin(),))
    model[2].register_full_backward_pre_hook(lambda module, came: (came[0].cos(),))
    return model


def looked_at(parameter: torch.Tensor) -> None:
    parameter.grad.cos()


def with_hooks_on_parameters() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight.register_hook(lambda grad: grad.sin())
    model[1].weight.register_post_accumulate_grad_hook(looked_at)
    return model


def twice(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """A parameter whose gradient comes from two places, and one that is the gradient of two parameters."""
    return layers[0](layers[0](x)) + layers[1].bias + layers[2].bias


CASES: dict[str, Callable[[], nn.Module]] = {
    "custom function": lambda: Net(lambda m, x: Scaled.apply(2.0, m[0](x), "", m[1](x))[0]),
    "gradients that are not made": lambda: Net(lambda m, x: Halves.apply(m[0](x))[0]),
    "reentrant checkpoint": lambda: Net(lambda m, x: m[2](checkpoint(m[1], m[0](x), use_reentrant=True))),
    "nested reentrant checkpoints": lambda: Net(
        lambda m, x: checkpoint(
            lambda t: m[2](checkpoint(lambda u: m[1](u).relu(), t, use_reentrant=True)), m[0](x), use_reentrant=True
        )
    ),
    "checkpoint": lambda: Net(
        lambda m, x: m[2](checkpoint(lambda t: m[1](t).relu().tanh(), m[0](x), use_reentrant=False))
    ),
    "hooks on tensors and nodes": lambda: Net(hooked),
    "hooks on modules": with_hooks_on_modules,
    "hooks on parameters": with_hooks_on_parameters,
    "gradient penalty": lambda: Net(penalty),
    "shared": lambda: Net(twice),
    "in place": lambda: Net(lambda m, x: m[1](F.relu_(m[0](x).mul_(2)))),
    "detached": lambda: Net(lambda m, x: m[1](m[0](x).detach()) + m[0](x)),
    "weight norm": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    "complex": lambda: Net(lambda m, x: torch.fft.rfft(m[0](x)).abs()),
    "split": lambda: Net(
        lambda m, x: m[1](torch.cat([part.relu() for part in m[0](x).split(2, -1)][:3] * 2, -1)[:, :8])
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_backward_has_the_ops_of_the_engine_in_its_order(case: str) -> None:
    with FakeTensorMode():
        model = CASES[case]()
        loss = model(torch.empty(4, 8)).float().sum()
        with Names() as engine:
            loss.backward()
    trace = capture_model(CASES[case], lambda device: ((torch.empty(4, 8),), {}), device="cpu")
    ours = [op.name for op in trace.ops if op.phase == "backward" and "detach" not in op.name]
    assert ours == engine.names


@needs_cuda_build
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", ["fp32", "amp"])
def test_it_is_captured_for_cuda(case: str, precision: str) -> None:
    trace = capture_model(
        CASES[case], lambda device: ((torch.empty(4, 8),), {}), precision=precision, optimizer="adamw"
    )
    assert {op.phase for op in trace.ops} == {"forward", "backward", "optimizer"}
    if precision == "amp":
        assert any(op.dtype == "float16" for op in trace.ops)


@needs_cuda_build
def test_autocast_inside_the_model_is_that_of_a_gpu() -> None:
    def lowered(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return layers[0](x)

    trace = capture_model(Net(lowered), (torch.randn(4, 8),))
    assert [op.dtype for op in trace.ops if op.kernel == "matmul"] == ["bfloat16", "bfloat16"]


@needs_cuda_build
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_recomputes_in_autocast(reentrant: bool) -> None:
    model = Net(lambda m, x: checkpoint(lambda t: m[1](t).relu(), m[0](x), use_reentrant=reentrant))
    trace = capture_model(model, (torch.randn(4, 8, requires_grad=True),), precision="amp")
    products = [op for op in trace.ops if op.kernel == "matmul"]
    assert len(products) == 2 + 1 + 4  # forward, again, two gradients each
    assert {op.dtype for op in products} == {"float16"}


def test_what_a_checkpoint_computes_again_is_freed_as_its_backward_goes() -> None:
    """Three sigmoids: each recomputed output dies with the node that saved it, before the region's end."""
    model = Net(lambda m, x: checkpoint(lambda t: t.sigmoid().sigmoid().sigmoid(), m[0](x), use_reentrant=True))
    trace = capture_model(model, (torch.randn(64, 8),), device="cpu")
    again = [i for i, op in enumerate(trace.ops) if op.phase == "backward" and op.name == "aten.sigmoid.default"]
    back = [i for i, op in enumerate(trace.ops) if op.name == "aten.sigmoid_backward.default"]
    assert len(again) == len(back) == 3
    ends = [trace.storages[trace.ops[i].writes[0]].free for i in again]
    assert ends[1] == back[1] + 1
    assert ends[0] == back[2] + 1


def test_a_compiled_part_runs_as_it_was_written() -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    names = [op.name for op in capture_model(plain, (torch.randn(4, 8),), device="cpu").ops]
    compiled = nn.Sequential(nn.Linear(8, 8), torch.compile(nn.Linear(8, 8)))
    assert [op.name for op in capture_model(compiled, (torch.randn(4, 8),), device="cpu").ops] == names
    assert [op.name for op in capture_model(torch.compile(plain), (torch.randn(4, 8),), device="cpu").ops] == names


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.LazyLinear(3), (torch.ones(2, 2),), "weight has no shape yet"),
        (nn.Linear(2, 2), (torch.ones(2, 2).to_sparse(),), "layout torch.sparse_coo"),
        (nn.Linear(2, 2), (torch.nested.nested_tensor([torch.ones(2, 2)]),), "an input"),
        (nn.Sequential(nn.Embedding(9, 2, sparse=True), nn.Linear(2, 2)), (torch.ones(3, dtype=torch.long),), "sparse"),
        (Net(lambda m, x: m[0](x) + CONSTANT), (torch.ones(2, 8),), "register_buffer"),
    ],
)  # fmt: skip
def test_what_cannot_be_captured_is_refused_with_a_way_out(model: nn.Module, inputs: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture_model(model, inputs, device="cpu")


CONSTANT = torch.ones(8)


def test_tensors_that_are_plain_attributes_follow_the_model() -> None:
    captured = capture_model(Attribute(), (torch.ones(2, 8),), device="cpu")
    assert any(op.name == "aten.mul.Tensor" for op in captured.ops)


class Attribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.scales = [torch.full((8,), 2.0)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scales[0]


def test_parameters_of_one_storage_are_of_one_storage_in_the_trace() -> None:
    flat = torch.zeros(8 * 8 + 8)
    model = nn.Linear(8, 8)
    model.weight = nn.Parameter(flat[:64].view(8, 8))
    model.bias = nn.Parameter(flat[64:])
    trace = capture_model(model, (torch.ones(2, 8),), device="cpu")
    assert [s.nbytes for s in trace.storages if s.category == "parameter"] == [72 * 4]


# -- nothing is touched, nothing is left ----------------------------------------------------------


def everything(model: nn.Module) -> list[Any]:
    found: list[Any] = []
    for name, module in model.named_modules():
        hooks = [len(value) for key, value in vars(module).items() if key.endswith("hooks")]
        found.append((name, module.training, hooks, sorted(vars(module))))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else tensor.grad.tolist()
        found.append((name, id(tensor), tensor._version, tensor.tolist(), grad, tensor.requires_grad, tensor.device))
    return found


def surroundings() -> list[Any]:
    kinds = ("cuda", "cpu")
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.is_grad_enabled(),
        [torch.is_autocast_enabled(kind) for kind in kinds],
        [torch.get_autocast_dtype(kind) for kind in kinds],
        torch.is_autocast_cache_enabled(),
        torch.autograd.graph._engine_run_backward is torch.autograd._engine_run_backward,
        torch.autograd._engine_run_backward.__name__,
        F.scaled_dot_product_attention.__name__,
        torch._C._current_graph_task_id(),
        len(torch.overrides._get_current_function_mode_stack()),
        torch._C._len_torch_dispatch_stack(),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        "register_hook" in vars(torch.autograd.function.BackwardCFunction),
        torch.empty(1).__class__,
    ]


class Draws(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        random.random()
        np.random.rand()
        return F.dropout(x, 0.5) + torch.rand_like(x)


def sample(last: nn.Module) -> nn.Module:
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), Draws(), nn.Flatten(), nn.Linear(24, 3), last)
    model(torch.randn(5, 4, 8)).sum().backward()
    model[1].eval()
    model[4].register_forward_hook(lambda module, args, output: None)
    model[4].weight.register_hook(lambda grad: grad)
    return model


class Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is not torch.Tensor:
            raise ValueError("no")
        return x


class RaisesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        if isinstance(grad, FakeTensor):
            raise ValueError("no")
        return grad


class Late(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return RaisesInBackward.apply(x)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda_build)])
@pytest.mark.parametrize("last", [nn.Identity, Raises, Late])
def test_neither_the_model_nor_the_surroundings_are_touched(last: type[nn.Module], device: str) -> None:
    torch.manual_seed(3)
    model, x = sample(last()), torch.randn(5, 4, 8)
    before, around = everything(model), surroundings()
    if last is nn.Identity:
        capture_model(model, (x,), device=device, precision="amp-bf16", optimizer="sgd")
    else:
        with pytest.raises(CaptureError, match=r"ValueError: no"):
            capture_model(model, (x,), device=device, precision="amp-bf16", optimizer="sgd")
    assert everything(model) == before
    assert surroundings() == around


def test_the_callers_modes_do_not_leak_into_the_step() -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    plain = capture_model(model, (x,), device="cpu")
    with torch.no_grad():
        assert capture_model(model, (x,), device="cpu") == plain
    with torch.inference_mode():
        assert capture_model(model, (x,), device="cpu") == plain
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert capture_model(model, (x,), device="cpu") == plain
        assert torch.is_autocast_enabled("cpu")


def fakes() -> int:
    gc.collect()
    return sum(1 for thing in gc.get_objects() if type(thing) is FakeTensor)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda_build)])
@pytest.mark.parametrize("last", [nn.Identity, Raises])
def test_twenty_captures_leave_nothing_behind(last: type[nn.Module], device: str) -> None:
    model, x = sample(last()), torch.randn(5, 4, 8)

    def once() -> None:
        try:
            capture_model(model, (x,), device=device, precision="amp", optimizer="adamw")
        except CaptureError:
            assert last is Raises

    for _ in range(3):
        once()
    tensors = fakes()
    objects = len(gc.get_objects())
    for _ in range(20):
        once()
    assert fakes() <= tensors
    assert len(gc.get_objects()) - objects < 200


class CopiesAPart(nn.Module):
    """Builds its second half as a copy of the first, and shrinks it, as pruned models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.second = copy.deepcopy(self.first)
        self.third = copy.deepcopy(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        return self.third(x) if "third" in self._modules else x


def test_a_model_that_copies_parts_of_itself_while_it_is_built() -> None:
    """The copies were of another fake mode, which ended the capture and later the process."""
    for _ in range(2):
        trace = capture_model(CopiesAPart, lambda place: ((torch.zeros(4, 8),), {}), optimizer="sgd")
        assert sum(op.name.startswith("aten.addmm") for op in trace.ops) == 4
