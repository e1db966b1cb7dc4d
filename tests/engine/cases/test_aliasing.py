"""One storage, many tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.engine.cases.conftest import EAGER, Ground, equal
from vdnn.engine import VirtualDevice, offloading


@pytest.mark.case(23, 24, 25, 29)
@pytest.mark.parametrize("what", ["thrice", "transposes", "strides", "expanded"])
def test_one_host_copy_for_all_who_share_a_storage(ruled: Ground, what: str) -> None:
    x = torch.randn(32, 32, device=ruled.kind, requires_grad=True)

    def loss() -> Tensor:
        y = x * 1
        if what == "thrice":
            return (y * y).sum() + (y @ y).sum() + y.square().sum()
        if what == "transposes":
            return (y.t() @ y).sum() + (y.t() * y).sum() + (y[:16].t() @ y[:16]).sum()
        if what == "strides":
            return (y[::2] * y[1::2]).sum() + (y[:, ::2] * y[:, 1::2]).sum()
        return (y.expand(4, 32, 32) * y).sum()

    with ruled.block() as off:
        ours = loss()
    assert equal(torch.autograd.grad(ours, x), torch.autograd.grad(loss(), x))
    assert off.counts.offloaded_bytes == 32 * 32 * 4


@pytest.mark.case(26)
def test_a_saved_view_frees_the_base_that_nobody_saved() -> None:
    device = VirtualDevice()
    with device, offloading(device, EAGER):
        x = torch.randn(64, requires_grad=True)
        base = torch.empty(1024, 64)
        view = base[:768]
        y = view * x  # saves the view, not the base
        start = device.account.live_bytes()
        del base, view
        torch.ones(64) * x  # the engine lets go at the next pack at the latest
        assert start - device.account.live_bytes() >= 768 * 64 * 4 - 1024
        y.sum().backward()
    device.finish()


class Rotary(nn.Module):
    """Every layer saves the same two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], device=x.device)[:, None] / torch.arange(1, 17, device=x.device)
        cosine, sine = angles.cos(), angles.sin()
        for layer in self.layers:
            y = layer(x)
            x = y * cosine + y.roll(1, -1) * sine
        return x


@pytest.mark.case(27)
def test_a_table_that_all_layers_share(ground: Ground) -> None:
    def step(model: nn.Module, number: int) -> list[Tensor]:
        out = model(torch.randn(2, 8, 16, device=ground.kind))
        out.square().sum().backward()
        return [out]

    ground.same(Rotary, step)


@pytest.mark.case(28)
@pytest.mark.parametrize("seed", range(4))
def test_an_address_that_is_used_again_is_another_tensor(seed: int) -> None:
    """Each product saves a new tensor; released memory comes back at the same address."""
    x = torch.randn(64, 64, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        total = x.sum() * 0
        for n in range(12):
            y = x * (n + 1)
            total = total + (y * y).sum()
            del y
        return torch.autograd.grad(total, x)

    with offloading(VirtualDevice(seed=seed), EAGER) as off:
        ours = run()
    assert equal(ours, run())
    assert off.counts.offloaded_storages == 12


@pytest.mark.case(31)
def test_attention_with_a_strided_mask(ruled: Ground) -> None:
    q = torch.randn(2, 4, 9, 8, device=ruled.kind, requires_grad=True)
    weight = torch.randn(2, 4, 9, 16, device=ruled.kind, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        mask = (weight * 2)[..., :9]  # rows are 16 apart, not 9
        out = F.scaled_dot_product_attention(q.sin(), q.cos(), q.tanh(), attn_mask=mask)
        return out, *torch.autograd.grad(out.sum(), (q, weight))

    with ruled.block():
        ours = run()
    assert equal(ours, run())


@pytest.mark.case(32)
def test_parameters_never_move_not_even_after_they_were_replaced(ground: Ground) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)).to(ground.kind)
    ground.wrap(model)
    moved: list[bool] = []  # whether it was a parameter or buffer, at the moment it was taken
    adopt = ground.device.adopt

    def adopted(tensor: Tensor, *rest: object):
        fixed = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        moved.append(tensor.untyped_storage()._cdata in fixed)
        return adopt(tensor, *rest)

    ground.device.adopt = adopted
    for change in (
        lambda: None,
        lambda: model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True),
        lambda: model.double().float(),
    ):
        change()
        before = len(moved)
        model(torch.randn(8, 16, device=ground.kind)).square().sum().backward()
        assert len(moved) > before
    assert not any(moved)


@pytest.mark.case(24, 37)
@pytest.mark.parametrize("split", [torch.unsafe_chunk, torch.chunk], ids=["a counter each", "one counter"])
def test_parts_of_a_storage_that_are_changed_one_after_the_other(ruled: Ground, split) -> None:
    """As in the cells of LSTM and GRU: each part is saved after its own change, at the same version as the others."""
    x = torch.randn(8, 32, device=ruled.kind, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        one, two, three = split((x * 1)[:, :24], 3, 1) if split is torch.chunk else split(x[:, :24] * 1, 3, 1)
        if split is torch.chunk:
            one, two, three = one.sigmoid(), two.tanh(), three.sigmoid()
        else:
            one.sigmoid_(), two.tanh_(), three.sigmoid_()
        return torch.autograd.grad((one * two + three).square().sum(), x)

    with ruled.block() as off:
        ours = run()
    assert equal(ours, run())
    assert off.counts.offloaded_storages > 1
