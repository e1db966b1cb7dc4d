"""The memory tracker: sizes derived by hand, and a second account that must agree."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vdnn.engine import Rule, offloading
from vdnn.engine.hostpool import HostPool
from vdnn.engine.virtual import VirtualDevice
from vdnn.errors import UsageError
from vdnn.tracker import track


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64, 10),
    )


def sums(items: object) -> dict[str, int]:
    totals: dict[str, int] = {}
    for item in items:  # type: ignore[attr-defined]
        totals[item.category] = totals.get(item.category, 0) + item.nbytes
    return totals


def test_the_peak_of_a_perceptron_is_the_one_derived_by_hand() -> None:
    """float32, batch 5, sizes in bytes.

    parameters: 4*3 + 4 + 2*4 + 2 = 26 numbers = 104; input 5*3 = 60; hidden 5*4 = 80 each.
    Backward reaches its peak when the ReLU's gradient is made: beside parameters and input there are the
    hidden values that ReLU saved (80), the loss (4), the gradient that backward began with (4: the call of
    backward holds it), the second layer's gradients (8*4 + 2*4 = 40), the incoming gradient (80) and the
    outgoing (80).
    """
    model = perceptron()
    x = torch.randn(5, 3)
    with track(model) as memory:
        loss = model(x).sum()
        loss.backward()
    result = memory.result()
    assert result.source == "measured"
    assert result.peak_requested_bytes == 104 + 60 + 80 + 4 + 4 + 40 + 80 + 80
    assert "threshold_backward" in result.peak_at
    assert result.peak_at.startswith("backward of 1")
    assert sums(result.peak_items) == {
        "parameter": 104,
        "input": 60,
        "activation": 80 + 4,
        "gradient": 4 + 40 + 160,
    }
    assert {(i.category, i.module, i.nbytes) for i in result.peak_items} >= {
        ("parameter", "0", 64),
        ("parameter", "2", 40),
        ("activation", "1", 80),
        ("gradient", "2", 120),
        ("gradient", "1", 80),
    }
    assert "cannot lower 368 B of the 452 B" in result.notes[0]
    assert result.peak_allocated_bytes is None
    assert result.peak_reserved_bytes is None


def test_events_add_up_to_the_peak_and_to_what_is_left() -> None:
    model = perceptron()
    x = torch.randn(5, 3)
    with track(model) as memory:
        loss = model(x).sum()
        loss.backward()
        left = memory.live_bytes
    result = memory.result()
    assert result.timeline is not None
    result.check()
    assert result.timeline.resident == (("parameter", 104),)
    level = peak = 104
    for event in result.timeline.memory:
        level += event.nbytes
        peak = max(peak, level)
    assert peak == result.peak_requested_bytes
    assert level == left == 104 + 60 + 4 + 104  # parameters, input, loss, gradients
    times = [event.time_ns for event in result.timeline.memory]
    assert times == sorted(times)


def test_memory_is_given_back_the_moment_its_storage_dies() -> None:
    with track() as memory:
        a = torch.zeros(100)
        b = a.view(10, 10)
        assert memory.live_bytes == 400
        del a
        assert memory.live_bytes == 400
        del b
        assert memory.live_bytes == 0
        assert memory.peak_bytes == 400


def test_in_place_ops_and_views_take_nothing_and_resize_takes_the_difference() -> None:
    with track() as memory:
        a = torch.zeros(100)
        a.add_(1).mul_(2)
        a[10:20].t().zero_()
        assert memory.live_bytes == 400
        a.resize_(150)
        assert memory.live_bytes == 600
        a.set_()
        assert memory.live_bytes == 0


def test_momentum_is_optimizer_state_and_a_new_peak_starts_where_one_is_asked() -> None:
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(5, 3)
    with track(model, optimizer) as memory:
        for _ in range(2):
            memory.reset_peak()
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
        assert memory.live_by_category() == {"parameter": 104, "input": 60, "gradient": 104, "optimizer_state": 104}
        result = memory.result()
    assert result.timeline is not None
    assert dict(result.timeline.resident)["optimizer_state"] == 104
    assert ("optimizer_state", "0", 64) in {(i.category, i.module, i.nbytes) for i in result.peak_items}


def test_a_recomputed_block_is_made_of_activations() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
    x = torch.randn(16, 8, requires_grad=True)
    with track(model) as memory:
        checkpoint(model, x, use_reentrant=False).sum().backward()
    peak = sums(memory.result().peak_items)
    # the peak is in GELU's backward: its input, made again, beside two gradients of the same size
    assert peak["activation"] == 16 * 64 * 4 + 4  # and the loss
    assert peak["gradient"] == 2 * 16 * 64 * 4 + (8 * 64 + 8) * 4 + 4


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_tracker_and_the_account_of_the_virtual_device_agree(name: str) -> None:
    torch.manual_seed(0)
    model = convnet()
    kind = getattr(torch.optim, name)
    optimizer = kind(model.parameters(), lr=0.01)
    x, y = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
    device = VirtualDevice()
    with device, track(model, optimizer) as memory:
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            assert memory.live_bytes == device.account.live_bytes()
        assert memory.peak_bytes == device.peak_bytes
        memory.reset_peak()
        device.account.reset_peak()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert memory.peak_bytes == device.peak_bytes


def test_the_two_accounts_agree_when_feature_maps_are_offloaded() -> None:
    torch.manual_seed(0)
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    peaks = []
    for offload in (False, True):
        device = VirtualDevice()
        rule = Rule(offload=offload, min_bytes=1024, max_inflight_bytes=0, ahead_bytes=0)
        with device, track(model, optimizer) as memory:
            for _ in range(2):
                memory.reset_peak()
                device.account.reset_peak()
                optimizer.zero_grad()
                with offloading(device, rule):
                    loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                assert memory.live_bytes == device.account.live_bytes()
        assert memory.peak_bytes == device.peak_bytes
        peaks.append(memory.peak_bytes)
    assert peaks[1] < peaks[0]


def test_an_optimizer_step_that_fails_does_not_stay_open() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            raise ArithmeticError

    model = perceptron()
    x = torch.randn(5, 3)
    with track(model) as memory:
        with pytest.raises(ArithmeticError):
            Broken(model.parameters(), lr=0.1).step()
        model(x).sum().backward()
        assert memory.result().peak_at.startswith("backward of 1")


def test_a_closure_inside_the_optimizer_step_is_forward_and_backward() -> None:
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(5, 3)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(x).sum()
        loss.backward()
        return loss.item()

    with track(model, optimizer) as memory:
        optimizer.step(closure)
        assert memory.result().peak_at.startswith("backward of 1")
        live = memory.live_by_category()
    assert (live["gradient"], live["optimizer_state"]) == (104, 104)


def test_numbers_are_the_same_with_and_without() -> None:
    grads = []
    for tracked in (False, True):
        torch.manual_seed(0)
        model, x = convnet(), torch.randn(4, 3, 16, 16)
        if tracked:
            with track(model):
                model(x).square().sum().backward()
        else:
            model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_nothing_is_kept_alive() -> None:
    model = perceptron()
    watched = weakref.ref(model)
    memory = track(model)
    with memory:
        out = model(torch.randn(5, 3))
        storage = weakref.ref(out.untyped_storage())
        out.sum().backward()
        del out
        assert storage() is None
    del model
    gc.collect()
    assert watched() is None
    assert memory.result().peak_requested_bytes == 452 + 40  # the output was held


def test_an_exception_leaves_nothing_behind() -> None:
    model = perceptron()
    with pytest.raises(RuntimeError, match="shapes"), track(model) as memory:
        model(torch.randn(5, 7))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    before = memory.result()
    torch.zeros(1000)
    assert memory.result() == before
    with track(model) as again:
        model(torch.randn(5, 3))
    assert again.peak_bytes == 104 + 60 + 160


def test_trackers_inside_one_another_each_count_their_own_stretch() -> None:
    with track() as outer:
        a = torch.zeros(10)
        with track() as inner:
            b = torch.zeros(20)
            assert inner.live_bytes == 80
        assert outer.live_bytes == 120
        del a, b
        assert outer.live_bytes == 0
    assert (outer.peak_bytes, inner.peak_bytes) == (120, 80)


def test_host_memory_and_what_is_ignored_do_not_count() -> None:
    with track() as memory:
        block = HostPool(None).take(4096)
        assert block is not None
        device = torch.zeros(4096, dtype=torch.uint8)
        block.data.copy_(device)
        assert memory.live_bytes == 4096
        scratch = torch.zeros(100)
        memory.ignore(scratch)
        scratch.add_(1)
        assert memory.live_bytes == 4096
        del scratch
        assert memory.live_bytes == 4096


def test_a_tracker_is_entered_once() -> None:
    memory = track()
    with memory:
        pass
    with pytest.raises(UsageError, match=r"vdnn\.track"), memory:
        pass
