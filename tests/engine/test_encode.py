"""Feature maps of which the engine keeps a code: the same bits in every gradient, and exactly the predicted memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import vdnn
from tests.engine.steps import EVERYTHING, GPU, planned, same, trained
from tests.test_encoding import Everything
from vdnn.engine import VirtualDevice, engine_of
from vdnn.engine.encoded import EncodedStorage, windows_of
from vdnn.errors import DeviceOutOfMemory, EngineError
from vdnn.policies import decide
from vdnn.values import Encode, Entry, Plan, Recompute, SavedName
from vdnn.values.codes import code_bytes

POLICIES = ["encode", "encode-offload"]


class Shared(nn.Module):
    """One ReLU called twice, in place and not, one output of it held by the user, and one half of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.act, self.again = nn.ReLU(), nn.ReLU(inplace=True)
        self.held: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.act(self.first(x))
        z = self.again(self.second(x))
        left, right = (self.first(x) * 3).sin().chunk(2, dim=1)
        z = z + torch.cat([self.act(left), self.act(right)], dim=1)
        self.held = y
        return y + z, y


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "everything": (Everything, (2, 3, 40, 40), 7),
    "odd sizes": (Everything, (3, 3, 37, 31), 7),
    "shared": (Shared, (5, 16), 3),
}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape, _ = MODELS[name]
    return make(), torch.randn(shape)


def codes(plan: Plan) -> list[Encode]:
    return [entry.action for entry in plan.entries if isinstance(entry.action, Encode)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_every_bit_is_the_same(name: str, policy: str) -> None:
    expected = trained(*made(name))
    model, x = made(name)
    plan = planned(model, x, policy)
    assert len(codes(plan)) >= MODELS[name][2]
    device = VirtualDevice(seed=3)
    vdnn.wrap(model, plan=plan, device=device)
    got = trained(model, x)
    device.finish()
    assert same(got, expected)
    counts = engine_of(model).offloader.counts
    assert not counts.mismatches
    assert counts.encoded_storages == 3 * len(codes(plan))
    assert 0 < counts.code_bytes < counts.encoded_bytes / 4
    assert device.host_bytes()[0] == 0
    if policy == "encode-offload":
        assert counts.offloaded_bytes == 3 * plan.offloaded_bytes
        assert any(action.release_at for action in codes(plan))
    assert "encoded" in str(vdnn.report(model))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("where", ["channels last", "autocast", "bfloat16", "evaluation", "needs the input's gradient"])
def test_however_the_step_is_run(where: str, policy: str) -> None:
    outcomes = []
    for ours in (False, True):
        model, x = made("everything")
        if where == "channels last":
            model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        elif where == "bfloat16":
            model, x = model.bfloat16(), x.bfloat16()
        elif where == "evaluation":
            model.eval()
        elif where == "needs the input's gradient":
            x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "autocast"):
            if ours:
                vdnn.wrap(model, policy=policy, device=VirtualDevice(seed=2), min_bytes=1, keep_soon=False)
            outcomes.append(trained(model, x))
            if ours:
                report = vdnn.report(model)
                assert not report.mismatches
                assert report.encoded_storages >= 3 * 6
    assert same(*outcomes)


SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.3), nn.LeakyReLU(0.3, inplace=True)])
def test_numbers_that_are_no_numbers(act: nn.Module, dtype: torch.dtype) -> None:
    """A ReLU lets the gradient of a NaN through, a leaky one weakens it: the code must know."""
    gradients = []
    for ours in (False, True):
        x = torch.tensor([*SPECIAL, *SPECIAL[::-1]], dtype=dtype).requires_grad_()
        model = nn.Sequential(nn.Identity(), act)
        if ours:
            how = "sign" if isinstance(act, nn.ReLU) else "positive"
            name = SavedName("1", 0, 0, str(dtype).removeprefix("torch."), 1, x.nbytes)
            plan = Plan("by hand", "", 1, "cpu", "", None, (Entry((name,), x.nbytes, Encode(how)),))  # type: ignore[arg-type]
            vdnn.wrap(model, plan=plan, device=VirtualDevice())
        y = model(x + 0)
        y.backward(torch.arange(1, 19, dtype=dtype))
        gradients.append([y.detach(), x.grad])
        if ours:
            assert vdnn.report(model).encoded_storages == 1
            vdnn.unwrap(model)
    assert same(*gradients)


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_any_mask_comes_back(bits: list[bool]) -> None:
    mask = torch.tensor(bits)
    storage = EncodedStorage(VirtualDevice(), mask, "bits")
    assert storage.code is not None
    assert storage.code.nbytes == code_bytes("bits", len(bits))
    flat, begin, changes = storage.fetch(torch.bool)
    assert (begin, changes) == (0, 0)
    assert flat.view(torch.uint8).max() <= 1
    assert torch.equal(flat[: len(bits)], mask)


@st.composite
def pools(draw: Any) -> tuple[nn.MaxPool2d, torch.Tensor]:
    two = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    size = two(1, 4)
    pool = nn.MaxPool2d(
        size,
        two(1, 4),
        (draw(st.integers(0, size[0] // 2)), draw(st.integers(0, size[1] // 2))),
        two(1, 3),
        ceil_mode=draw(st.booleans()),
    )
    least = [d * (k - 1) + 1 for k, d in zip(size, pool.dilation, strict=True)]  # type: ignore[arg-type]
    plane = [draw(st.integers(n, n + 40)) for n in least]
    torch.manual_seed(draw(st.integers(0, 5)))
    x = torch.randint(0, 3, (2, 3, *plane)).float()
    if draw(st.booleans()):
        x[draw(st.integers(0, 1))] = float("nan") if draw(st.booleans()) else -float("inf")
    return pool, x.to(memory_format=torch.channels_last) if draw(st.booleans()) else x


@given(pools())
def test_any_pool_s_indices_come_back(case: tuple[nn.MaxPool2d, torch.Tensor]) -> None:
    pool, x = case
    pool.return_indices = True
    given, indices = pool(x)
    windows = windows_of(pool, x.shape, given.shape)
    assert windows is not None
    for how in ("index8", "index16"):
        why = EncodedStorage.refusal(how, indices, windows)  # type: ignore[arg-type]
        assert why == "" or (how == "index8" and windows.reach > 255)
        if not why:
            storage = EncodedStorage(VirtualDevice(), indices, how, windows)  # type: ignore[arg-type]
            flat, _, _ = storage.fetch(torch.int64)
            assert torch.equal(flat.as_strided(indices.shape, indices.stride()), indices)


def test_the_windows_of_what_is_no_pool_of_that_input_are_not_known() -> None:
    pool = nn.MaxPool2d(2)
    assert windows_of(pool, torch.Size((1, 1, 8, 8)), torch.Size((1, 1, 4, 4))) is not None
    assert windows_of(pool, torch.Size((1, 1, 8, 8)), torch.Size((1, 1, 4, 3))) is None
    assert windows_of(pool, torch.Size((1, 2, 8, 8)), torch.Size((1, 1, 4, 4))) is None
    assert windows_of(pool, None, torch.Size((1, 1, 4, 4))) is None
    assert windows_of(nn.AvgPool2d(2), torch.Size((1, 1, 8, 8)), torch.Size((1, 1, 4, 4))) is None


LARGE = ("torchvision:vgg11", "torchvision:googlenet", "torchvision:resnet18", "hf:gpt2")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["demo:cnn", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_the_peak_is_the_predicted_one(name: str, policy: str) -> None:
    options = {"demo:cnn": {}, "hf:gpt2": {"layers": 2, "sequence": 32}}.get(name, {"image_size": 64})
    work = vdnn.load(name, batch=4, **options)
    result = vdnn.run(work, policy, GPU, device="virtual", steps=2, min_bytes=512)
    assert result.exact
    assert result.measured.peak_requested_bytes == result.predicted.peak_requested_bytes


class Late(nn.Module):
    """Pools and masks at the very end, where forward holds most: so the peak falls on a code being made or unpacked."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sigmoid(), nn.Conv2d(8, 16, 1))
        self.kind = kind
        self.act, self.pool, self.mean = nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.convs(x)
        if self.kind == "sign":
            return self.pool(self.act(y))
        if self.kind == "bits":
            return torch.native_dropout(y, 0.5, True)[0]
        if self.kind == "mask":
            return y.masked_fill(y > 0, 1.0)
        return self.mean(y)


@pytest.mark.parametrize("kind", ["sign", "bits", "mask", "shape"])
def test_the_memory_while_a_code_is_made_and_unpacked_is_the_predicted_one(kind: str) -> None:
    torch.manual_seed(0)
    for size in (24, 21):
        model, x = Late(kind), torch.randn(2, 3, size, size)
        trace = vdnn.capture(model, x, device="cpu")
        plan = decide("encode", trace, GPU, EVERYTHING)
        assert codes(plan)
        device = VirtualDevice()
        vdnn.wrap(model, plan=plan, device=device)
        trained(model, x, 1)
        model.zero_grad()
        device.account.reset_peak()
        with device:
            out = model(x)  # the capture holds the output to the end, too
            out.sum().backward()
        predicted = vdnn.simulate(trace, plan, hardware="rtx4090")
        assert device.peak_bytes == predicted.peak_requested_bytes


def hand_made(how: str, module: str, index: int, dtype: str, rank: int, nbytes: int, release: str = "") -> Plan:
    entry = Entry((SavedName(module, 0, index, dtype, rank, nbytes),), nbytes, Encode(how, release_at=release))  # type: ignore[arg-type]
    return Plan("by hand", "a model", 1, "cpu", "", None, (entry,))


def test_a_node_that_needs_more_is_an_error_and_leaves_nothing_behind() -> None:
    """The plan says that the second call's pack is a ReLU's: here it is a sigmoid's, which needs values."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()), torch.randn(4, 8)
    expected = trained(model, x, 1)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()), torch.randn(4, 8)
    device = VirtualDevice()
    vdnn.wrap(model, plan=hand_made("sign", "1", 0, "float32", 2, 128, "end #0"), device=device)
    loss = model(x).sum()
    with pytest.raises(EngineError, match="SigmoidBackward0 asks for a saved tensor of which"):
        loss.backward()
    del loss
    assert device.host_bytes()[0] == 0
    model.zero_grad()
    vdnn.unwrap(model)
    assert same(trained(model, x, 1), expected)


def test_a_look_from_outside_of_backward_is_an_error() -> None:
    model = nn.Sequential(nn.ReLU())
    vdnn.wrap(model, plan=hand_made("sign", "0", 0, "float32", 1, 32), device=VirtualDevice())
    y = model(torch.randn(8, requires_grad=True))
    with pytest.raises(EngineError, match="something outside of backward asks"):
        _ = y.grad_fn._saved_result
    y.sum().backward()


def test_what_was_changed_since_raises_as_eager_does() -> None:
    model = nn.Sequential(nn.ReLU())
    vdnn.wrap(model, plan=hand_made("sign", "0", 0, "float32", 1, 32), device=VirtualDevice())
    y = model(torch.randn(8, requires_grad=True))
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="is at version 1; expected version 0"):
        y.sum().backward()


def test_what_is_changed_before_it_is_saved_again_keeps_its_values() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.relu(x)
            with torch.no_grad():
                y.sub_(1)
            return F.relu_(y * 1)

    model = Twice()
    names = (SavedName("", 0, 0, "float32", 1, 32), SavedName("", 0, 1, "float32", 1, 32))
    plan = Plan("by hand", "", 1, "cpu", "", None, (Entry(names, 32, Encode("sign")),))
    vdnn.wrap(model, plan=plan, device=VirtualDevice())
    out = model(torch.randn(8, requires_grad=True)).sum()
    assert "another one of its entry was" in vdnn.report(model).mismatches[0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


class OtherPool(nn.MaxPool2d):
    """Not MaxPool2d itself: who knows what it does."""


@pytest.mark.parametrize(
    ("pool", "taken", "why"),
    [
        (OtherPool(2), (1, 1, 8, 8), "windows of its pool are not known"),
        (nn.MaxPool2d((2, 1), (2, 1), dilation=(33, 1)), (1, 1, 64, 8), "reaches 264 elements far"),
    ],
)
def test_indices_of_windows_that_no_byte_tells_stay(pool: nn.Module, taken: tuple[int, ...], why: str) -> None:
    x = torch.randn(taken, requires_grad=True)
    given = pool(x)
    (expected,) = torch.autograd.grad(given.square().sum(), x)
    model = nn.Sequential(pool)
    vdnn.wrap(model, plan=hand_made("index8", "0", 1, "int64", 4, 8 * given.numel()), device=VirtualDevice())
    (got,) = torch.autograd.grad(model(x).square().sum(), x)
    assert why in vdnn.report(model).mismatches[0]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_backward_twice_and_of_the_gradient(policy: str) -> None:
    outcomes = []
    for ours in (False, True):
        torch.manual_seed(1)
        model, x = Everything(), torch.randn(2, 3, 40, 40, requires_grad=True)
        if ours:
            vdnn.wrap(model, plan=planned(model, x, policy), device=VirtualDevice(seed=4))
        torch.manual_seed(2)
        out = model(x).square().mean()
        (first,) = torch.autograd.grad(out, x, create_graph=True)
        first.square().sum().backward(retain_graph=True)
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        out.backward()
        outcomes.append([first.detach(), *found, *(p.grad for p in model.parameters() if p.grad is not None), x.grad])
    assert same(*outcomes)


def test_no_room_to_unpack_a_code_is_out_of_memory_and_the_next_step_is_exact() -> None:
    expected = trained(*made("everything"), 1)
    model, x = made("everything")
    device = VirtualDevice(memory="1GiB")
    vdnn.wrap(model, plan=planned(model, x, "encode-offload"), device=device)
    with device:
        out = model(x).square().mean()
        device.account.limit_bytes = device.account.live_bytes()
        with pytest.raises(DeviceOutOfMemory):
            out.backward()
        del out
        device.account.limit_bytes = 1 << 30
        model.load_state_dict(made("everything")[0].state_dict())
        got = trained(model, x, 1)
    assert same(got, expected)


def test_a_full_host_keeps_the_codes_on_the_device() -> None:
    expected = trained(*made("everything"), 1)
    model, x = made("everything")
    device = VirtualDevice(host_budget=1)
    vdnn.wrap(model, plan=planned(model, x, "encode-offload"), device=device)
    with pytest.warns(UserWarning, match="host budget of 1 B is spent"):
        got = trained(model, x, 1)
    assert same(got, expected)
    assert vdnn.report(model).offloaded_storages == 0
    assert vdnn.report(model).encoded_storages >= 7


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_grows(policy: str) -> None:
    model, x = made("everything")
    device = VirtualDevice()
    vdnn.wrap(model, plan=planned(model, x, policy), device=device)
    live = []
    with device:
        for _ in range(20):
            trained(model, x, 1)
            live.append(device.account.live_bytes())
    assert live[-1] == live[3]
    assert device.host_bytes()[0] == 0


def test_encoding_and_recomputing_in_one_plan() -> None:
    """What a cheap module makes from something whole comes again, the rest of what has a code is encoded."""
    expected = trained(*made("everything"))
    model, x = made("everything")
    coded, plan = planned(model, x, "encode"), planned(model, x, "recompute")
    sources = {e.action.source for e in plan.entries if isinstance(e.action, Recompute)}
    entries = [
        code
        if isinstance(code.action, Encode) and e.action.action == "keep" and not sources & set(map(str, e.saved))
        else e
        for e, code in zip(plan.entries, coded.entries, strict=True)
    ]
    both = replace(plan, entries=tuple(entries))
    both.check()
    assert {e.action.action for e in both.entries} == {"keep", "encode", "recompute"}
    device = VirtualDevice()
    vdnn.wrap(model, plan=both, device=device)
    assert same(trained(model, x), expected)
    report = vdnn.report(model)
    assert not report.mismatches
    assert report.dropped_storages
    assert report.encoded_storages
