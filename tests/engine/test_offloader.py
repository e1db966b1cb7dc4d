"""The engine on the virtual device: same numbers, right order, nothing left behind."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from vdnn.engine import Rule, Schedule, VirtualDevice, engine_of, offloading, unwrap_model, wrap_model
from vdnn.engine.lifecycle import State, move
from vdnn.errors import DeviceOutOfMemory, EngineError, LifecycleError, RaceError, UsageError

EAGER = Rule(min_bytes=1, max_inflight_bytes=1 << 12, ahead_bytes=1 << 14)


def by_rule(rule: Rule = EAGER) -> Callable[..., Schedule]:
    return lambda model, args, kwargs: Schedule(None, rule)


def gradients(model: nn.Module, x: torch.Tensor, seed: int = 7) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(x)
    out.float().square().mean().backward()
    return [out.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Small(nn.Module):
    """Branches, a module called twice, views, an in-place activation, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.conv(x)))
        y = self.twice(torch.tanh(x)) * x
        y = F.max_pool2d(self.drop(self.twice(y) + x), 2)
        left, right = y.chunk(2, dim=1)
        y = torch.cat([left.sigmoid() * right, right.transpose(2, 3) @ left], 1)
        return self.head(y.mean((2, 3)))


@pytest.fixture
def small() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Small(), torch.randn(4, 3, 16, 16, requires_grad=True)


@pytest.mark.parametrize("seed", range(5))
def test_gradients_are_bit_for_bit_the_same_for_every_order_of_late_copies(small, seed) -> None:
    model, x = small
    expected = gradients(copy.deepcopy(model), x)
    wrap_model(model, VirtualDevice(seed=seed), by_rule())
    assert same(gradients(model, x), expected)
    counts = engine_of(model).offloader.counts
    assert counts.offloaded_storages > 5
    assert counts.prefetched_storages > 0


@pytest.mark.case(2)
@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 64), ("squeezenet1_1", 64), ("shufflenet_v2_x0_5", 64), ("mobilenet_v3_small", 64)]
)
def test_real_models_have_the_same_gradients_and_running_statistics(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name)
    x = torch.randn(2, 3, size, size)
    twin = copy.deepcopy(model)
    expected = gradients(twin, x)
    device = VirtualDevice(seed=3)
    wrap_model(model, device, by_rule())
    assert same(gradients(model, x), expected)
    assert same(list(model.buffers()), list(twin.buffers()))
    assert device.host_bytes()[0] == 0
    assert device.host_bytes()[1] > 0


class _Skipping(VirtualDevice):
    """Forgets the n-th wait: what a bug in the engine would do."""

    def __init__(self, skip: int) -> None:
        super().__init__(seed=1)
        self.skip, self.waits = skip, 0

    def wait(self, stream, event) -> None:
        self.waits += 1
        if self.waits - 1 != self.skip:
            super().wait(stream, event)


def test_every_wait_that_is_left_out_is_found_as_a_race() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.Tanh())])
    x = torch.randn(32, 64)

    def run(skip: int) -> int:
        device = _Skipping(skip)
        rule = Rule(min_bytes=1, max_inflight_bytes=1 << 10, ahead_bytes=1 << 14)
        wrap_model(model, device, by_rule(rule))
        try:
            gradients(model, x)
            gradients(model, x)
            device.finish()
        finally:
            unwrap_model(model)
        return device.waits

    waits = run(-1)
    assert waits >= 20
    missed = []
    for skip in range(waits):
        try:
            run(skip)
        except RaceError:
            continue
        missed.append(skip)
    print(f"{waits} waits, {waits - len(missed)} of them noticed when left out")
    # A wait for an event that an earlier wait on the same stream already covers orders nothing new.
    assert missed == sorted(set(missed) & _redundant(model, x, waits))


def _redundant(model: nn.Module, x: torch.Tensor, waits: int) -> set[int]:
    """Waits whose event the waiting stream knew all of already, found independently from the vector clocks."""
    found = set()

    class Recording(_Skipping):
        def wait(self, stream, event) -> None:
            if all(s is stream or stream.known.get(s, 0) >= tick for s, tick in event.known.items()):
                found.add(self.waits)
            super().wait(stream, event)

    wrap_model(model, Recording(-1), by_rule(Rule(min_bytes=1, max_inflight_bytes=1 << 10, ahead_bytes=1 << 14)))
    gradients(model, x)
    gradients(model, x)
    unwrap_model(model)
    return found


@pytest.mark.case(21)
def test_without_the_check_a_missing_wait_for_the_copy_back_gives_wrong_numbers() -> None:
    class Late(VirtualDevice):
        def wait(self, stream, event) -> None:
            if stream is not self.compute_stream:
                super().wait(stream, event)

        def _dally(self) -> None:
            """Never run a copy before somebody waits for it."""

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()), torch.randn(8, 64)
    expected = gradients(copy.deepcopy(model), x)
    wrap_model(model, Late(check=False), by_rule(Rule(min_bytes=1, max_inflight_bytes=0)))
    assert not same(gradients(model, x), expected)


@pytest.mark.case(37)
def test_a_saved_tensor_changed_in_place_raises_as_eager_does() -> None:
    def broken() -> torch.Tensor:
        x = torch.randn(300, 300, requires_grad=True)
        y = x * 2
        z = y * y
        y.add_(1)
        return z.sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation") as eager:
        broken().backward()
    for rule in (EAGER, Rule(offload=False)):
        with offloading(VirtualDevice(), rule):
            loss = broken()
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as ours:
            loss.backward()
        facts = r"operation: \[torch\.FloatTensor \[300, 300\]\].* is at version 1; expected version 0 instead"
        assert re.search(facts, str(eager.value))
        assert re.search(facts, str(ours.value))


@pytest.mark.case(23, 24, 25, 30)
def test_one_storage_is_copied_once_and_its_views_come_back_as_they_were() -> None:
    device = VirtualDevice()
    x = torch.randn(64, 64, requires_grad=True)
    y = x * 1
    with offloading(device, EAGER) as off:
        a = y @ y.t()
        b = y[::2] * y[1::2]
        c = y.t() * y
        d = y.as_strided((32, 64), (64, 1), 64) * 2 * y.expand(2, 64, 64)[0, :32]
    loss = a.sum() + b.sum() + c.sum() + d.sum()
    ((got,)) = torch.autograd.grad(loss, x)
    z = x * 1
    e = z @ z.t()
    f = z[::2] * z[1::2]
    g = z.t() * z
    h = z.as_strided((32, 64), (64, 1), 64) * 2 * z.expand(2, 64, 64)[0, :32]
    (expected,) = torch.autograd.grad(e.sum() + f.sum() + g.sum() + h.sum(), x)
    assert torch.equal(got, expected)
    assert off.counts.offloaded_bytes == 64 * 64 * 4 + 32 * 64 * 4  # y once, and the doubled half of it


@pytest.mark.case(32)
def test_parameters_their_transposes_and_buffers_never_move() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    device = VirtualDevice()
    wrap_model(model, device, by_rule())
    moved: list[int] = []
    adopt = device.adopt
    device.adopt = lambda t, *rest: (moved.append(t.untyped_storage()._cdata), adopt(t, *rest))[1]  # type: ignore[method-assign]
    gradients(model, torch.randn(8, 64))
    assert moved
    assert not {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())} & set(moved)


@pytest.mark.case(34, 35)
def test_backward_may_run_twice_and_gradients_have_gradients(small) -> None:
    model, x = small
    twin = copy.deepcopy(model)
    wrap_model(model, VirtualDevice(), by_rule())
    results = []
    for m in (model, twin):
        torch.manual_seed(1)
        out = m(x).square().sum()
        out.backward(retain_graph=True)
        out.backward(retain_graph=True)
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        grad.square().sum().backward()
        results.append([p.grad.clone() for p in m.parameters()])
        m.zero_grad()
    assert same(*results)


@pytest.mark.case(10)
def test_two_forwards_then_two_backwards_in_either_order(small) -> None:
    model, x = small
    model.eval()
    twin = copy.deepcopy(model)
    wrap_model(model, VirtualDevice(), by_rule())
    for order in ((0, 1), (1, 0)):
        results = []
        for m in (model, twin):
            m.zero_grad()
            outs = [m(x).sum(), m(x * 2).sum()]
            for i in order:
                outs[i].backward()
            results.append([p.grad.clone() for p in m.parameters()])
        assert same(*results)


@pytest.mark.case(39)
def test_a_graph_without_backward_leaves_no_byte_behind(small) -> None:
    model, x = small
    device = VirtualDevice()
    wrap_model(model, device, by_rule())
    gc.disable()
    try:
        for _ in range(20):
            model(x)
            assert device.host_bytes()[0] == 0
    finally:
        gc.enable()
    reserved = device.host_bytes()[2]
    for _ in range(5):
        gradients(model, x)
    assert device.host_bytes()[0] == 0
    assert device.host_bytes()[2] == reserved


@pytest.mark.case(42)
def test_after_an_exception_in_forward_the_next_step_is_exact(small) -> None:
    model, x = small
    expected = gradients(copy.deepcopy(model), x)
    device = VirtualDevice()
    wrap_model(model, device, by_rule())

    def fail(*_: object) -> None:
        raise ValueError("a user's own mistake")

    handle = model.twice.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="own mistake"):
        model(x)
    handle.remove()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert same(gradients(model, x), expected)
    assert device.host_bytes()[0] == 0


@pytest.mark.case(42)
def test_after_a_keyboard_interrupt_in_forward_the_next_step_is_exact(small) -> None:
    model, x = small
    expected = gradients(copy.deepcopy(model), x)
    wrap_model(model, VirtualDevice(), by_rule())

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.twice.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    assert same(gradients(model, x), expected)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@pytest.mark.case(43, 47)
def test_a_model_is_wrapped_once_and_unwrapped_to_what_it_was(small) -> None:
    model, x = small
    names = list(model.state_dict())
    wrap_model(model, VirtualDevice(), by_rule())
    with pytest.raises(EngineError, match="wrapped already"):
        wrap_model(nn.Sequential(model), VirtualDevice(), by_rule())
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    assert same(gradients(twin, x), gradients(model, x))
    pickle.loads(pickle.dumps(model))
    unwrap_model(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(EngineError, match="not wrapped"):
        unwrap_model(model)


@pytest.mark.case(41)
def test_evaluation_between_steps_touches_nothing(small) -> None:
    model, x = small
    device = VirtualDevice()
    wrap_model(model, device, by_rule())
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    assert device.host_bytes()[2] == 0


@pytest.mark.case(51)
def test_when_host_memory_is_spent_tensors_stay_and_one_warning_says_so(small) -> None:
    model, x = small
    expected = gradients(copy.deepcopy(model), x)
    device = VirtualDevice(host_budget="16KiB")
    wrap_model(model, device, by_rule())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert same(gradients(model, x), expected)
        assert same(gradients(model, x), expected)
    assert [str(w.message)[:15] for w in caught] == ["the host budget"]
    assert device.host_bytes()[2] <= 16 * 1024


def test_a_virtual_device_runs_out_of_memory_without_offload_and_not_with_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.Tanh())])
    x = torch.randn(2048, 256)
    weights = sum(p.numel() * 4 for p in model.parameters())
    memory = 2 * weights + 8 * x.numel() * 4
    expected = gradients(copy.deepcopy(model), x)
    with VirtualDevice(memory=memory), pytest.raises(DeviceOutOfMemory, match="out of memory"):
        gradients(copy.deepcopy(model), x)
    device = VirtualDevice(memory=memory)
    wrap_model(model, device, by_rule(Rule(min_bytes=1, max_inflight_bytes=x.numel() * 4, ahead_bytes=x.numel() * 4)))
    with device:
        got = gradients(model, x)
    assert same(got, expected)
    assert device.peak_bytes <= memory


def test_a_state_that_does_not_allow_a_move_is_named() -> None:
    with pytest.raises(LifecycleError, match="from ON_HOST to RESIDENT; from there: PREFETCHING, RELEASED"):
        move(State.ON_HOST, State.RESIDENT)


@pytest.mark.parametrize("memory", ["0", "-1", "many", "", "12 XB"])
def test_sizes_that_are_none_are_refused(memory: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        VirtualDevice(memory=memory)
