"""Bytes on the device and on the host, and the edges of the options."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vdnn
from tests.engine.cases.conftest import EAGER, Ground, equal
from vdnn.engine import Rule, VirtualDevice, offloading
from vdnn.errors import UsageError


def deep(layers: int = 8, width: int = 64) -> nn.Module:
    return nn.Sequential(*[part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())])


@pytest.mark.case(49)
def test_what_leaves_the_device_is_what_the_host_takes() -> None:
    """At the end of forward: the device holds less by exactly what the host holds more."""
    torch.manual_seed(0)
    model = deep()
    live = []
    for rule in (Rule(offload=False), Rule(min_bytes=1, max_inflight_bytes=0)):
        device = VirtualDevice()
        with device, offloading(device, rule):
            loss = model(torch.randn(256, 64)).sum()
            live.append((device.account.live_bytes(), device.host_bytes()[0]))
        loss.backward()
        device.finish()
    (plain, nothing), (ours, host) = live
    assert nothing == 0
    assert host > 0
    assert plain - ours == host


@pytest.mark.case(50)
def test_no_host_memory_is_taken_after_the_second_step(ground: Ground) -> None:
    model = ground.wrap(deep().to(ground.kind))
    reserved = []
    for _ in range(5):
        model(torch.randn(32, 64, device=ground.kind)).sum().backward()
        model.zero_grad()
        ground.nothing_left()
        reserved.append(ground.device.host_bytes()[2])
    assert reserved[1] > 0
    assert len(set(reserved[1:])) == 1


@pytest.mark.case(51)
def test_bytes_reserved_are_within_two_percent_of_bytes_moved(ground: Ground) -> None:
    """Blocks are whole pages, so of tensors that are not tiny next to nothing is lost."""
    model = ground.wrap(deep(4, 512).to(ground.kind))
    for _ in range(2):
        model(torch.randn(513, 512, device=ground.kind)).sum().backward()
    moved = ground.offloader(model).counts.offloaded_bytes // 2
    peak, reserved = ground.device.host_bytes()[1:3]
    assert moved <= peak <= reserved <= 1.02 * moved


@pytest.mark.case(52)
@pytest.mark.parametrize("least", [1, 8 * 64 * 4, 8 * 64 * 4 + 1])
def test_the_least_size_is_the_least_that_moves(least: int) -> None:
    with offloading(VirtualDevice(), Rule(min_bytes=least)) as off:
        deep(2)(torch.randn(8, 64)).sum().backward()
    assert bool(off.counts.offloaded_storages) == (least <= 8 * 64 * 4)


@pytest.mark.case(52)
@pytest.mark.parametrize("window", [0, 8 * 64 * 4, 1 << 30])
@pytest.mark.parametrize("inflight", [0, 8 * 64 * 4, 1 << 30])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_any_window_in_both_directions(window: int, inflight: int, layers: int) -> None:
    torch.manual_seed(0)
    model, x = deep(layers), torch.randn(8, 64, requires_grad=True)
    with offloading(VirtualDevice(seed=layers), Rule(True, 1, inflight, window)):
        ours = torch.autograd.grad(model(x).sum(), x)
    assert equal(ours, torch.autograd.grad(model(x).sum(), x))


@pytest.mark.case(52)
def test_a_model_without_parameters_or_layers(ground: Ground) -> None:
    for model in (nn.Identity(), nn.Sequential(), nn.Tanh()):
        ground.wrap(model)
        x = torch.randn(8, 8, device=ground.kind, requires_grad=True)
        model(x * 1).square().sum().backward()
        twin = x.detach().clone().requires_grad_()
        vdnn.unwrap(ground.models.pop())
        model(twin * 1).square().sum().backward()
        assert torch.equal(x.grad, twin.grad)


@pytest.mark.case(56)
def test_two_hundred_steps_hold_no_more_than_two() -> None:
    device = VirtualDevice()
    model = deep(3, 16)
    live = set()
    with device:
        for step in range(200):
            with offloading(device, EAGER):
                loss = model(torch.randn(8, 16)).sum()
            loss.backward()
            model.zero_grad()
            del loss
            device.finish()
            if step:
                live.add((device.account.live_bytes(), device.host_bytes()))
    assert len(live) == 1


@pytest.mark.case(59)
def test_without_a_gpu_wrap_says_that_it_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        model = deep(1)  # a model on the CPU, on a machine with a GPU: the same
    else:
        model = deep(1)
        with pytest.raises(UsageError, match="no CUDA device here"):
            vdnn.offload()
    with caplog.at_level("WARNING", "vdnn"):
        assert vdnn.wrap(model) is model
    assert "the model is on the CPU: offload is inactive" in caplog.text
    model(torch.randn(2, 64)).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_bytes": -1}, "min_bytes"),
        ({"window_bytes": -1}, "window_bytes"),
        ({"max_inflight_bytes": -5}, "max_inflight_bytes"),
        ({"policy": "vdnn-nothing"}, "vdnn-nothing"),
        ({"budget": "-3GiB"}, "3GiB"),
        ({"budget": 0}, "0 is not a size"),
        ({"optimizer": "lion"}, "lion"),
        ({"hardware": "gtx0"}, "gtx0"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        vdnn.wrap(deep(1), device=VirtualDevice(), **options)  # type: ignore[arg-type]
