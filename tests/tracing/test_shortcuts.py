"""What the shortcuts say of an op is what the fake mode says: whole captures, and one op at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vdnn
from vdnn.tracing import recorder
from vdnn.tracing.shortcuts import shortcut

ATEN: Any = torch.ops.aten


class Mixed(nn.Module):
    """Views, slices added to each other, batch norm, in-place ops, a broadcast, and integers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        y = y[:, :4] + y[:, 4:] * y[:, 4:]
        y = torch.cat([y, y.transpose(2, 3).relu_()], 1)
        y = y.mul_(2).add_(y.mean(1, keepdim=True))
        return self.head(y.flatten(2).permute(0, 2, 1).mean(1)) + torch.arange(4, device=x.device)


@pytest.mark.parametrize("how", [{}, {"channels_last": True}, {"precision": "amp"}, {"device": "cpu"}])
def test_a_capture_is_the_same_with_and_without_shortcuts(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = vdnn.capture(Mixed(), torch.randn(2, 3, 9, 9), optimizer="sgd", **how)
    used = []
    monkeypatch.setattr(recorder, "shortcut", lambda *given: used.append(given[1]))
    plain = vdnn.capture(Mixed(), torch.randn(2, 3, 9, 9), optimizer="sgd", **how)
    assert used  # or this compares a capture with itself
    assert taken == plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["torchvision:densenet121", "timm:efficientnet_b0", "hf:gpt2", "timm:tnt_s_patch16_224"]
)
def test_a_real_model_is_captured_the_same_with_and_without_shortcuts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = vdnn.load(name, batch=2)
    taken = vdnn.capture(work, precision="amp", optimizer="sgd")
    monkeypatch.setattr(recorder, "shortcut", lambda *given: None)
    assert taken == vdnn.capture(work, precision="amp", optimizer="sgd")


LAYOUTS = st.permutations(range(3))
SIZES = st.lists(st.integers(1, 4), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(SIZES, LAYOUTS, LAYOUTS, st.booleans(), st.integers(0, 2))
def test_two_tensors_of_any_layout_add_as_the_fake_mode_has_them(
    sizes: list[int], ours: list[int], theirs: list[int], sliced: bool, along: int
) -> None:
    with FakeTensorMode() as mode:
        pair = []
        for order in (ours, theirs):
            wide = [n + (sliced and axis == along) for axis, n in enumerate(sizes)]
            tensor = torch.empty([wide[i] for i in order], device="cpu").permute([order.index(i) for i in range(3)])
            pair.append(tensor.narrow(along, 0, sizes[along]))
        found = shortcut(mode, ATEN.add.Tensor, tuple(pair), {})
        expected = ATEN.add.Tensor(*pair)
    if found is not None:
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
    if ours == theirs == [0, 1, 2]:
        assert found is not None


def test_the_gradient_of_a_number_that_several_layers_take() -> None:
    """Its parts are added up, as tensors of no dimension: their strides are none."""

    class Shifted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shift = x.mean().sigmoid()
            return (x * shift + shift) * shift

    trace = vdnn.capture(nn.Sequential(nn.Linear(4, 4), Shifted()), torch.randn(3, 4), device="cpu")
    assert any(op.name.startswith("aten.add") and op.phase == "backward" for op in trace.ops)


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_loss_of_classes_is_as_the_fake_mode_has_it(reduction: int, dtype: torch.dtype) -> None:
    with FakeTensorMode() as mode:
        targets = torch.zeros(5, dtype=torch.int64)
        for given in (torch.empty(5, 7, dtype=dtype), torch.empty(7, 5, dtype=dtype).t()):
            forward = (given, targets, None, reduction, -100)
            expected = ATEN.nll_loss_forward.default(*forward)
            backward = (expected[0], given, targets, None, reduction, -100, expected[1])
            for func, args in ((ATEN.nll_loss_forward.default, forward), (ATEN.nll_loss_backward.default, backward)):
                found, made = shortcut(mode, func, args, {}), func(*args)
                assert (found is None) == (reduction == 0)
                pairs = zip(found, made, strict=True) if isinstance(found, tuple) else [(found, made)]
                for ours, theirs in pairs if found is not None else ():
                    assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)


@settings(max_examples=40, deadline=None)
@given(SIZES, LAYOUTS, st.booleans(), st.integers(0, 2))
def test_a_copy_lies_as_the_fake_mode_has_it(sizes: list[int], order: list[int], sliced: bool, along: int) -> None:
    with FakeTensorMode() as mode:
        wide = [n + (sliced and axis == along) for axis, n in enumerate(sizes)]
        tensor = torch.empty([wide[i] for i in order]).permute([order.index(i) for i in range(3)])
        tensor = tensor.narrow(along, 0, sizes[along])
        found, expected = shortcut(mode, ATEN.clone.default, (tensor,), {}), ATEN.clone.default(tensor)
    if found is not None:
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
    if order == [0, 1, 2] and not sliced:
        assert found is not None
