"""Models that do what few do: each trains to the same numbers, bit for bit, by rule and by plan."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vdnn
from vdnn.engine import Rule, Schedule, VirtualDevice, engine_of, unwrap_model, wrap_model

WIDTH, ROWS = 24, 12

Run = Callable[[nn.Module], list[Tensor]]
ODD: dict[str, Callable[[], tuple[nn.Module, Run]]] = {}


def odd(function: Callable[[], tuple[nn.Module, Run]]) -> Callable[[], tuple[nn.Module, Run]]:
    ODD[function.__name__] = function
    return function


class Module(nn.Module):
    """A function of linear layers."""

    def __init__(self, function: Callable[..., Any], layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.layers, *args, **kwargs)


def rows(count: int = ROWS, grad: bool = True) -> Tensor:
    return torch.randn(count, WIDTH, requires_grad=grad)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def step(model: nn.Module, x: Tensor | None = None, **kwargs: Any) -> list[Tensor]:
    model.zero_grad()
    x = rows() if x is None else x
    out = model(x, **kwargs)
    out.square().mean().backward()
    return [out.detach().clone(), *gradients(model), *([x.grad.clone()] if x.grad is not None else [])]


@odd
def a_gradient_of_a_gradient() -> tuple[nn.Module, Run]:
    def run(model: nn.Module) -> list[Tensor]:
        x = rows()
        y = model(x)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        model.zero_grad()
        (slope.square().sum() + y.sum()).backward()
        return [*gradients(model), x.grad.clone()]

    return Module(lambda m, x: m[1](torch.tanh(m[0](x))).sigmoid(), 2), run


@odd
def a_gradient_asked_for_inside_forward() -> tuple[nn.Module, Run]:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = torch.tanh(m[0](x))
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return m[1](y) + slope

    return Module(forward, 2), lambda model: step(model, rows(grad=False))


@odd
def in_place_ops_on_views_and_activations() -> tuple[nn.Module, Run]:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = F.relu_(m[0](x)).chunk(2, 1)
        joined = torch.cat([a, b.sigmoid()], 1)
        joined[:, :4].mul_(2)
        return F.elu_(m[1](F.leaky_relu_(joined.t().contiguous(), 0.1).t())).t().exp()

    return Module(forward, 2), step


@odd
def several_forms_of_one_storage() -> tuple[nn.Module, Run]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m[0](x)
        parts = h.view(-1, WIDTH // 2).square().sum() + h[2:].exp().sum() + (h.t() @ h).tanh().sum()
        return (parts + h.expand(3, ROWS, WIDTH).sin().sum()).reshape(1)

    return Module(forward, 1), step


class _OtherDtypes(torch.autograd.Function):
    """Saves its input as integers and as bytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.detach().view(torch.int32), x.detach().view(torch.uint8), x > 0)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        numbers, octets, positive = ctx.saved_tensors
        return grad * (numbers.view(torch.float32) + octets.view(torch.float32)).tanh() * positive


@odd
def one_storage_as_three_dtypes() -> tuple[nn.Module, Run]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m[0](x)
        return _OtherDtypes.apply(h) + h.sigmoid()

    return Module(forward, 1), step


@odd
def complex_and_conjugated() -> tuple[nn.Module, Run]:
    def forward(m: Any, x: Tensor) -> Tensor:
        z = torch.fft.fft(m[0](x))
        z = z * z.conj() + z.conj().exp() * 0.01
        return torch.view_as_real(z).square().sum(-1) + z.imag.neg().sin() + torch.tanh(z.real)

    return Module(forward, 1), step


@dataclass
class _Result:
    found: Tensor
    more: dict[str, Any]


@odd
def a_dataclass_as_output() -> tuple[nn.Module, Run]:
    def forward(m: Any, x: Tensor) -> _Result:
        h = torch.tanh(m[0](x))
        return _Result(m[1](h), {"hidden": [h.sum(), None]})

    def run(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        out = model(rows())
        (out.found.square().sum() + out.more["hidden"][0]).backward()
        return gradients(model)

    return Module(forward, 2), run


@odd
def nothing_as_output() -> tuple[nn.Module, Run]:
    losses: list[Tensor] = []

    def run(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        model(rows())
        losses.pop().backward()
        return gradients(model)

    return Module(lambda m, x: losses.append(torch.tanh(m[0](x)).square().sum()), 1), run


@odd
def layers_called_any_number_of_times() -> tuple[nn.Module, Run]:
    def forward(m: Any, x: Tensor, times: int) -> Tensor:
        for _ in range(times):
            x = torch.tanh(m[0](x))
        return m[1](x) if times != 2 else x * x

    return Module(forward, 2), lambda model: [t for n in (3, 0, 2, 5, 1) for t in step(model, times=n)]


@odd
def batches_of_changing_size() -> tuple[nn.Module, Run]:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.BatchNorm1d(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    return model, lambda model: [t for n in (12, 7, 3, 30, 7, 12) for t in step(model, rows(n))]


@odd
def forwards_and_backwards_in_any_order() -> tuple[nn.Module, Run]:
    def run(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        one, two, three = model(rows()).sum(), model(rows()).exp().sum(), model(rows(5)).sum()
        two.backward()
        four = model(rows()).sum()
        one.backward()
        (three + four).backward()
        return gradients(model)

    return Module(lambda m, x: F.gelu(m[1](torch.tanh(m[0](x)))), 2), run


@odd
def three_dimensions_with_channels_last() -> tuple[nn.Module, Run]:
    model = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(inplace=True), nn.Conv3d(4, 4, 3))
    x = torch.randn(2, 2, 6, 6, 6).contiguous(memory_format=torch.channels_last_3d)
    return model.to(memory_format=torch.channels_last_3d), lambda model: step(model, x)


@odd
def forwards_in_other_threads() -> tuple[nn.Module, Run]:
    def run(model: nn.Module) -> list[Tensor]:
        found: list[Tensor] = []
        for x in (rows(), rows(5), rows()):
            thread = threading.Thread(target=lambda x=x: found.extend(step(model, x)))
            thread.start()
            thread.join()
        return found

    return Module(lambda m, x: F.gelu(m[1](torch.tanh(m[0](x)))), 2), run


@odd
def a_scaler_that_meets_infinity() -> tuple[nn.Module, Run]:
    def run(model: nn.Module) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        for number in range(4):
            optimizer.zero_grad()
            loss = model(rows()).square().sum() * (1e35 if number == 1 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return [*(p.detach().clone() for p in model.parameters()), torch.tensor(scaler.get_scale())]

    return Module(lambda m, x: m[1](torch.tanh(m[0](x))), 2), run


@odd
def a_thousand_tiny_tensors() -> tuple[nn.Module, Run]:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(120):
            x = x * 1.0001 + x.sin() * 1e-4
        return m[0](x)

    return Module(forward, 1), lambda model: step(model, rows(2))


@pytest.mark.parametrize("how", ["rule", "plan"])
@pytest.mark.parametrize("name", ODD)
def test_an_odd_model_trains_to_the_same_numbers(name: str, how: str) -> None:
    torch.manual_seed(5)
    model, run = ODD[name]()
    plain = copy.deepcopy(model)
    torch.manual_seed(9)
    expected = [tensor for _ in range(2) for tensor in run(plain)]
    end = torch.get_rng_state()
    torch.manual_seed(9)
    device = VirtualDevice(seed=3)
    if how == "rule":
        schedule = Schedule(None, Rule(min_bytes=1, max_inflight_bytes=4000, ahead_bytes=5000))
        wrap_model(model, device, lambda *_: schedule)
    else:
        vdnn.wrap(model, policy="vdnn-all", device=device, min_bytes=1)
    got = [tensor for _ in range(2) for tensor in run(model)]
    device.finish()
    counts = engine_of(model).offloader.counts
    unwrap_model(model)
    # of a model that asks for gradients in its own forward the capture sees hardly anything that is worth moving
    assert counts.offloaded_storages > 0 or (name, how) == ("a_gradient_asked_for_inside_forward", "plan")
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), end)
    assert device.host_bytes().used_bytes == 0
    assert counts.mismatches == []


@pytest.mark.parametrize("norm", [nn.LayerNorm(WIDTH), nn.GroupNorm(4, WIDTH), nn.BatchNorm1d(WIDTH)], ids=type)
def test_statistics_of_norms_under_autocast_are_planned_as_they_are(norm: nn.Module) -> None:
    """The CPU's norms keep them in the weight's dtype, and the plan said the input's: they stayed on the device."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), norm, nn.Linear(WIDTH, WIDTH))
    vdnn.wrap(model, policy="vdnn-all", device=VirtualDevice(), min_bytes=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(rows())
    out.float().sum().backward()
    assert vdnn.report(model).mismatches == ()
    vdnn.unwrap(model)


def test_a_model_of_which_nothing_is_trained_is_left_alone() -> None:
    """A frozen feature extractor, called with gradients enabled: wrap raised that there was nothing to train."""
    model = Module(lambda m, x: m[0](x), 1).requires_grad_(False)
    vdnn.wrap(model, policy="vdnn-all", device=VirtualDevice(), min_bytes=1)
    assert not model(rows(grad=False)).requires_grad
    vdnn.unwrap(model)
