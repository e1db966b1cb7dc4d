"""Whatever breaks a step off, wherever: the next step runs and is exact, and nothing is left behind."""

import gc
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vdnn.engine import Rule, Schedule, VirtualDevice, unwrap_model, wrap_model
from vdnn.engine.hostpool import HostPool
from vdnn.errors import DeviceOutOfMemory

RULE = Rule(min_bytes=1, max_inflight_bytes=2048, ahead_bytes=4096)
CALLS = ("record", "wait", "adopt", "allocate", "copy_out", "copy_back", "use", "host_block", "current_stream")


class Fault(Exception):
    """What breaks the step off."""


class BreakingDevice(VirtualDevice):
    """Raises at the call with the number `at`, counted from 1 over all calls that the engine makes."""

    at = 0
    calls = 0

    def _count(self):
        self.calls += 1
        if self.calls == self.at:
            raise Fault


for _name in CALLS:

    def _method(self, *args, _name=_name, **kwargs):
        if not self._lock._is_owned():  # the device's own calls of itself do not count
            self._count()
        return getattr(VirtualDevice, _name)(self, *args, **kwargs)

    setattr(BreakingDevice, _name, _method)


class BreakingOp(TorchDispatchMode):
    """Raises in front of the op with the number `at`."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error, self.ops = at, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        if self.ops == self.at:
            raise self.error
        return func(*args, **(kwargs or {}))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Sigmoid(), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Tanh()).double()


def step(model):
    for parameter in model.parameters():
        parameter.grad = None
    x = torch.linspace(-1, 1, 128, dtype=torch.double).reshape(8, 16)
    model(x).square().sum().backward()


def gradients(model):
    return [parameter.grad for parameter in model.parameters()]


def no_hooks_open():
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@pytest.fixture(autouse=True)
def _nothing_left_for_the_next_test():
    yield
    while not no_hooks_open():
        torch._C._autograd._pop_saved_tensors_default_hooks()


class Wrapped:
    """A wrapped network and the gradients of its step, as they are without the engine."""

    def __init__(self, device):
        plain = network()
        step(plain)
        self.expected = gradients(plain)
        self.device = device
        self.model = network()
        self.engine = wrap_model(self.model, device, lambda *_: Schedule(None, RULE))

    def broken_off(self, *kinds, run=None):
        """Whether the step is broken off by one of these."""
        try:
            (run or step)(self.model)
        except kinds:
            return True
        return False

    def check(self, hooks_closed=True):
        """The next step is exact; no hook, no copy and no byte is left behind."""
        if hooks_closed:
            assert no_hooks_open()
        step(self.model)
        assert no_hooks_open()
        for found, expected in zip(gradients(self.model), self.expected, strict=True):
            assert torch.equal(found, expected)
        gc.collect()
        self.device.finish()
        assert self.device.host_bytes()[0] == 0
        assert not self.device.races


def device_calls():
    device = BreakingDevice()
    wrapped = Wrapped(device)
    step(wrapped.model)
    unwrap_model(wrapped.model)
    return device.calls


@pytest.mark.case(42)
@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_fault_in_any_call_of_the_device(stride):
    calls = device_calls()
    assert calls > 50
    for at in range(1, calls + 1, stride):
        device = BreakingDevice(seed=at)
        device.at = at
        wrapped = Wrapped(device)
        assert wrapped.broken_off(Fault), at
        wrapped.check()


@pytest.mark.case(42)
@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("error", [Fault, KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_fault_in_any_op(error, stride):
    """Before each op of the step (or each ninth), the engine's own copies and views among them."""
    at = 1 - stride
    while True:
        at += stride
        wrapped = Wrapped(VirtualDevice(seed=at))
        mode = BreakingOp(at, error)

        def run(model, mode=mode):
            with mode:
                step(model)

        broken = wrapped.broken_off(error, run=run)
        if mode.ops < at:
            break
        if not broken:
            # a prefetch that found no room is left for the moment of need
            assert error is torch.OutOfMemoryError, at
            assert wrapped.engine.offloader.counts.no_room == 1, at
        # torch calls no module hook for what is no Exception: ours close when the next forward begins
        wrapped.check(hooks_closed=issubclass(error, Exception))
    assert at > 40


@pytest.mark.case(42)
def test_every_size_of_device_memory():
    """Too small a device fails in forward or in backward; the step after it, with room, is exact."""
    failed = []
    device = VirtualDevice()
    with device:
        wrapped = Wrapped(device)
        step(wrapped.model)
        peak = device.account.peak_bytes
        start = None
        for limit in range(peak // 4, peak + 2048, 2048):
            device.account.limit_bytes = limit
            device.account.reset_peak()
            failed.append(wrapped.broken_off(DeviceOutOfMemory))
            device.account.limit_bytes = None
            wrapped.check()
            for parameter in wrapped.model.parameters():
                parameter.grad = None
            start = start or device.account.live_bytes()
            assert device.account.live_bytes() == start
    assert failed[0]
    assert not failed[-1]


@pytest.mark.case(42)
@pytest.mark.parametrize("place", ["forward", "forward hook", "pre-hook", "tensor hook", "module backward hook"])
@pytest.mark.parametrize("error", [Fault, KeyboardInterrupt])
def test_a_fault_in_what_the_user_wrote(place, error):
    def fail(*_):
        raise error

    for index in range(5):
        wrapped = Wrapped(VirtualDevice(seed=index))
        part = wrapped.model[index]
        if place == "forward":
            part.forward = fail
        elif place == "forward hook":
            handle = part.register_forward_hook(fail)
        elif place == "pre-hook":
            handle = part.register_forward_pre_hook(fail)
        elif place == "tensor hook":
            handle = part.register_forward_hook(lambda m, i, o: o.register_hook(fail) and None)
        else:
            handle = part.register_full_backward_hook(fail)
        assert wrapped.broken_off(error)
        if place == "forward":
            del part.forward
        else:
            handle.remove()
        wrapped.check(hooks_closed=issubclass(error, Exception))


@pytest.mark.case(42)
def test_a_fault_in_another_thread():
    def fail(*_):
        raise Fault

    for index in range(5):
        wrapped = Wrapped(VirtualDevice(seed=index))
        handle = wrapped.model[index].register_forward_hook(fail)
        broken = []
        thread = threading.Thread(target=lambda w=wrapped, b=broken: b.append(w.broken_off(Fault)))
        thread.start()
        thread.join()
        assert broken == [True]
        handle.remove()
        wrapped.check()


@pytest.mark.case(51)
def test_memory_that_cannot_be_pinned_is_used_as_it_is_and_said_once():
    device = VirtualDevice()
    device._pool = HostPool(lambda data: None)
    wrapped = Wrapped(device)
    with pytest.warns(UserWarning, match="could not be pinned") as said:  # noqa: PT031
        for _ in range(2):
            wrapped.check()
    assert len(said) == 1
    assert wrapped.engine.offloader.counts.offloaded_bytes


@pytest.mark.case(51)
def test_a_spent_host_budget_keeps_tensors_on_the_device():
    for pages in range(1, 4):
        device = VirtualDevice(host_budget=4096 * pages)
        wrapped = Wrapped(device)
        with pytest.warns(UserWarning, match="host budget"):
            wrapped.check()
        assert device.host_bytes()[2] <= 4096 * pages
        assert wrapped.engine.offloader.counts.host_full


@pytest.mark.case(50, 56)
def test_two_hundred_steps_do_not_grow():
    """Every third one is broken off, in forward or in backward."""

    def fail(*_):
        raise Fault

    device = VirtualDevice()
    with device:
        wrapped = Wrapped(device)
        wrapped.check()
        reserved, live = device.host_bytes()[2], None
        for number in range(200):
            handle = None
            if number % 3 == 0:
                part = wrapped.model[number % 5]
                handle = part.register_forward_hook(fail) if number % 2 else part.register_full_backward_hook(fail)
            assert wrapped.broken_off(Fault) == (handle is not None)
            if handle is not None:
                handle.remove()
            if number % 20 == 0:
                wrapped.check()
                for parameter in wrapped.model.parameters():
                    parameter.grad = None
                live = live or device.account.live_bytes()
                assert device.account.live_bytes() == live
        assert device.host_bytes()[2] <= reserved
