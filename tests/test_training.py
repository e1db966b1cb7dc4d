"""Real steps: equal tensors, and a peak predicted to the byte."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import vdnn
from vdnn import training
from vdnn.errors import DeviceOutOfMemory, PlanMismatchError, UsageError
from vdnn.values import hardware

CASES = [
    ("demo:cnn", 4, {}, "sgd"),
    ("demo:cnn", 3, {}, "adamw"),
    ("demo:transformer", 2, {}, "adamw"),
    ("torchvision:resnet18", 2, {"image_size": 64}, "sgd"),
    ("torchvision:mobilenet_v3_small", 2, {"image_size": 64}, "none"),
    ("hf:gpt2", 2, {"layers": 2, "hidden": 64, "sequence": 32, "vocabulary": 101}, "adamw"),
]


@pytest.mark.case(49, 61)
@pytest.mark.parametrize("rules", ["event", "paper"])
@pytest.mark.parametrize(("name", "batch", "options", "optimizer"), CASES)
def test_the_measured_peak_is_the_predicted_one_to_the_byte(
    name: str, batch: int, options: dict[str, object], optimizer: str, rules: str
) -> None:
    work = vdnn.load(name, batch=batch, **options)
    done = vdnn.run(
        work, "vdnn-all", "rtx4090", steps=2, optimizer=optimizer, device="virtual", rules=rules, min_bytes=1
    )
    assert done.exact, done.differs
    assert done.compared > 2 * 4
    for name in ("peak_requested_bytes", "offloaded_bytes", "prefetched_bytes"):
        assert getattr(done.measured, name) == getattr(done.predicted, name), name
    assert done.engine is not None
    pages = 4096 * done.engine.offloaded_storages // done.engine.passes  # host blocks are whole pages
    assert 0 <= done.measured.host_peak_bytes - done.predicted.host_peak_bytes <= pages
    assert done.measured.iteration_time_ns is None
    assert (
        done.baseline.peak_requested_bytes
        == vdnn.simulate(vdnn.capture(work, device="cpu", optimizer=optimizer)).peak_requested_bytes
    )
    # the account of the virtual device and the tracker are independent
    assert not any("own account" in note for note in done.measured.notes)


@pytest.mark.parametrize("precision", ["bf16", "amp-bf16", "amp"])
def test_other_precisions_stay_exact(precision: str) -> None:
    done = vdnn.run(vdnn.load("demo:cnn", batch=2), steps=2, precision=precision, device="virtual", min_bytes=1)
    assert done.exact
    assert done.engine is not None
    assert done.engine.mismatches == ()
    assert done.measured.offloaded_bytes == done.predicted.offloaded_bytes
    assert done.measured.peak_requested_bytes == done.predicted.peak_requested_bytes
    assert done.measured.precision == precision


def test_a_difference_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    work = vdnn.load("demo:cnn", batch=2)
    machine = hardware("rtx4090")
    plain = training.train(work, None, "virtual", machine, steps=2)
    spoiled = [dict(step) for step in plain.steps]
    spoiled[1]["gradient of head.bias"] = spoiled[1]["gradient of head.bias"] + 1e-3
    again = training.train(work, None, "virtual", machine, steps=2, expected=spoiled)
    assert again.differs.startswith("step 2: gradient of head.bias differs by up to 0.001")
    same = training.train(work, None, "virtual", machine, steps=2, expected=plain.steps)
    assert same.differs == ""
    assert same.compared == 2 * len(plain.steps[0])


def test_a_plan_for_another_model_batch_or_device_is_refused_before_anything_runs() -> None:
    work = vdnn.load("demo:cnn", batch=2)
    other = vdnn.plan(vdnn.capture(vdnn.load("demo:transformer", batch=2), device="cpu"))
    larger = vdnn.plan(vdnn.capture(vdnn.load("demo:cnn", batch=3), device="cpu"))
    on_cuda = vdnn.plan(vdnn.capture(work))
    for plan in (other, larger, on_cuda):
        with pytest.raises(PlanMismatchError):
            vdnn.run(work, plan=plan, device="virtual")


@pytest.mark.case(49)
def test_a_virtual_device_that_is_too_small_runs_out_and_offload_makes_room() -> None:
    work = vdnn.load("demo:cnn", batch=8)
    small = replace(hardware("rtx4090"), memory_bytes=36 << 20, context_bytes=0)
    trace = vdnn.capture(work, device="cpu")
    plan = vdnn.plan(trace, small, "vdnn-all", min_bytes=1)
    with pytest.raises(DeviceOutOfMemory, match="offload more"):
        training.train(work, None, "virtual", small, steps=2)
    assert training.train(work, plan, "virtual", small, steps=2).result.fits


def test_a_step_that_fits_with_offload_alone_is_compared_with_one_that_does_not_fit() -> None:
    """`vdnn run` stopped where the run without offload was out of memory, which is what offload is for."""
    small = replace(hardware("rtx4090"), memory_bytes=36 << 20, context_bytes=0)
    done = vdnn.run(
        vdnn.load("demo:cnn", batch=8), "vdnn-all", small, device="virtual", steps=2, optimizer="none", min_bytes=1
    )
    assert done.exact
    assert done.measured.fits
    assert done.baseline.fits is False
    assert "losses: " in str(done)
    tiny = replace(small, memory_bytes=16 << 20)
    with pytest.raises(DeviceOutOfMemory, match=r"demo:cnn \(batch 8\) under vdnn-all, predicted to need 21.6 MiB: "):
        vdnn.run(
            vdnn.load("demo:cnn", batch=8), "vdnn-all", tiny, device="virtual", steps=2, optimizer="none", min_bytes=1
        )


def test_where_there_is_no_cuda_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training.find_place("auto") == "virtual"
    with pytest.raises(UsageError, match="--device virtual"):
        training.find_place("cuda")
    with pytest.raises(UsageError, match="did you mean cuda"):
        training.find_place("cud")
    with pytest.raises(UsageError, match="2 or more"):
        training.train(vdnn.load("demo:cnn", batch=2), None, "virtual", hardware("t4"), steps=1)


def test_the_callers_random_numbers_and_switches_stay() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    vdnn.run(vdnn.load("demo:cnn", batch=2), steps=2, device="virtual")
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    hooks = nn.modules.module._global_forward_pre_hooks
    assert not hooks
