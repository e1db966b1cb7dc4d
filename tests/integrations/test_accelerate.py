"""Accelerate's loop with a wrapped model: nothing but `vdnn.wrap` before `prepare`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vdnn
from vdnn.engine import EngineReport

accelerate = pytest.importorskip("accelerate")


def trained(precision: str, offload: bool) -> tuple[nn.Module, EngineReport | None]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    work = vdnn.load("demo:cnn", batch=4)
    torch.manual_seed(0)
    model = work.build()
    if offload:
        vdnn.wrap(model, "vdnn-all", device=vdnn.VirtualDevice(seed=1), min_bytes=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    (images,), _ = work.inputs("cpu")
    targets = work.targets("cpu")
    for step in range(4):
        torch.manual_seed(step)
        with accelerator.accumulate(model):
            loss = work.loss(model(images), targets)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    bare = accelerator.unwrap_model(model)
    return bare, vdnn.report(bare) if offload else None


@pytest.mark.case(7)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_gives_the_same_weights(precision: str) -> None:
    plain, _ = trained(precision, offload=False)
    ours, report = trained(precision, offload=True)
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert report is not None
    assert report.passes == 4
    assert report.offloaded_bytes > 0
    assert report.host_used_bytes == 0
    assert report.mismatches == ()
