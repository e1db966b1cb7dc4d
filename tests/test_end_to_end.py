"""Capture, plan, simulate, run: what was predicted is what the virtual device sees."""

from __future__ import annotations

import copy

import pytest
import torch

import vdnn
from vdnn.errors import EngineError, UsageError

MODELS = [("demo:cnn", 8), ("demo:transformer", 2), ("torchvision:resnet18", 2)]


def step(work, model) -> list[torch.Tensor]:
    torch.manual_seed(3)
    args, kwargs = work.inputs("cpu")
    loss = work.loss(model(*args, **kwargs), work.targets("cpu"))
    loss.backward()
    tensors = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return tensors


@pytest.mark.parametrize("rules", ["event", "paper"])
@pytest.mark.parametrize("policy", ["none", "vdnn-all", "vdnn-conv"])
@pytest.mark.parametrize(("name", "batch"), MODELS)
def test_a_plan_moves_exactly_what_was_predicted_and_gradients_stay(
    name: str, batch: int, policy: str, rules: str
) -> None:
    options = {"image_size": 64} if "torchvision" in name else {}
    work = vdnn.load(name, batch=batch, **options)
    trace = vdnn.capture(work, device="cpu")
    made = vdnn.plan(trace, "rtx4090", policy, rules=rules, min_bytes=1)
    predicted = vdnn.simulate(trace, made, "rtx4090")
    torch.manual_seed(0)
    model = work.build()
    expected = step(work, copy.deepcopy(model))
    device = vdnn.VirtualDevice(seed=5)
    vdnn.wrap(model, plan=made, device=device)
    got = step(work, model)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    report = vdnn.report(model)
    assert report.mismatches == ()
    assert report.offloaded_bytes == predicted.offloaded_bytes
    assert device.host_bytes()[0] == 0


def test_wrap_by_policy_captures_the_real_inputs_and_plans_from_them() -> None:
    work = vdnn.load("demo:cnn", batch=4)
    torch.manual_seed(0)
    model = work.build()
    expected = step(work, copy.deepcopy(model))
    vdnn.wrap(model, "vdnn-all", device=vdnn.VirtualDevice(), min_bytes=1)
    got = step(work, model)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    report = vdnn.report(model)
    assert report.offloaded_bytes > 0
    assert report.mismatches == ()
    vdnn.unwrap(model)
    with pytest.raises(EngineError, match="not wrapped"):
        vdnn.report(model)


def test_an_unknown_policy_or_option_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match="did you mean vdnn-conv"):
        vdnn.wrap(model, "vdnn-conf")
    trace = vdnn.capture(model, torch.randn(3, 2), device="cpu")
    with pytest.raises(UsageError, match="did you mean min_bytes"):
        vdnn.plan(trace, "rtx4090", "vdnn-all", min_byte=1)


def test_public_names_are_all_there() -> None:
    assert all(hasattr(vdnn, name) for name in vdnn.__all__)
