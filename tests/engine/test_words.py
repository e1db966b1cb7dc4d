"""What a user reads of `wrap`, `report` and `unwrap`, where there is little or nothing to do."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import vdnn
from vdnn.errors import FormatError, PlanMismatchError, UsageError
from vdnn.units import format_bytes
from vdnn.values import dumps


def small(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU())


def step(model: nn.Module, width: int = 8) -> None:
    model(torch.randn(4, width)).sum().backward()


def test_a_model_on_the_cpu_is_left_alone_and_its_report_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """`report` said "not wrapped: wrap it first" of a model that had just been wrapped."""
    model = small()
    with caplog.at_level(logging.INFO, "vdnn"):
        assert vdnn.wrap(model) is model
    assert len(caplog.records) == 1
    assert "on the CPU: offload is inactive" in caplog.text
    step(model)
    assert "on the CPU when it was wrapped: offload is inactive" in str(vdnn.report(model))
    assert vdnn.wrap(model, device=vdnn.VirtualDevice()) is model
    step(model)
    assert vdnn.report(model).passes == 1
    vdnn.unwrap(model)
    assert vdnn.unwrap(vdnn.wrap(model)) is model


def test_a_report_before_the_first_step_says_that_nothing_is_decided_yet() -> None:
    model = vdnn.wrap(small(), "vdnn-all", device=vdnn.VirtualDevice())
    with torch.no_grad():
        model(torch.randn(4, 8))
    report = vdnn.report(model)
    assert (report.passes, report.policy) == (0, "not decided")
    assert "no training step so far" in str(report)
    assert "a pass" not in str(report)


@pytest.mark.parametrize("policy", ["vdnn-all", ""])
def test_a_model_too_small_to_offload_is_one_line_that_says_why(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    model = vdnn.wrap(small(), policy, device=vdnn.VirtualDevice())
    with caplog.at_level(logging.INFO, "vdnn"):
        step(model)
        step(model)
    assert len(caplog.records) == 1
    said = caplog.records[0].getMessage()
    assert "nothing is offloaded" in said
    assert ("each is below 1.0 MiB" if policy else "fits into") in said
    assert "cannot leave" not in said
    text = str(vdnn.report(model))
    assert "2 passes" in text
    assert "0 storages" not in text
    assert "0 B" not in text


def test_host_memory_is_said_to_be_of_all_models_on_the_device() -> None:
    device = vdnn.VirtualDevice()
    two = [nn.Sequential(nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 64)) for _ in range(2)]
    models = [vdnn.wrap(model, "vdnn-all", device=device, min_bytes=1, keep_soon=False) for model in two]
    for model in models:
        step(model, 64)
    reports = [vdnn.report(model) for model in models]
    assert reports[0].host_reserved_bytes == reports[1].host_reserved_bytes > reports[0].offloaded_bytes > 0
    for report in reports:
        assert f"of all models on this device: {format_bytes(report.host_peak_bytes)} at most" in str(report)


@pytest.mark.parametrize("device", ["cuda", torch.device("cpu")])
def test_a_device_of_torch_s_is_refused(device: object) -> None:
    """It was taken, and the first training step failed inside the engine."""
    with pytest.raises(UsageError, match=r"leave it out for the model's own, or give vdnn\.VirtualDevice"):
        vdnn.wrap(small(), device=device)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="device is "):
        vdnn.offload(device=device)  # type: ignore[arg-type]


def test_a_plan_for_a_gpu_is_refused_on_a_virtual_device() -> None:
    """What CUDA saves is not what the CPU saves: the plan was taken, and moved what happened to have the same name."""
    model = small()
    trace = vdnn.capture(model, torch.randn(4, 8))
    plan = vdnn.plan(trace, policy="vdnn-all", min_bytes=1)
    with pytest.raises(PlanMismatchError, match="capture the model with device='cpu' and plan again"):
        vdnn.wrap(model, plan=plan, device=vdnn.VirtualDevice())


def test_an_unknown_option_of_a_capture_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown option of a capture 'precison': did you mean precision"):
        vdnn.capture(small(), torch.randn(4, 8), precison="amp")


def test_a_plan_is_taken_from_its_file_too(tmp_path: Path) -> None:
    model = small()
    plan = vdnn.plan(vdnn.capture(model, torch.randn(4, 8), device="cpu"), policy="vdnn-all", min_bytes=1)
    (tmp_path / "plan.json").write_text(dumps(plan))
    vdnn.wrap(model, plan=tmp_path / "plan.json", device=vdnn.VirtualDevice())
    step(model)
    assert vdnn.report(model).passes == 1
    with pytest.raises(FormatError, match=r"nowhere\.json"):
        vdnn.wrap(small(), plan="nowhere.json", device=vdnn.VirtualDevice())


def test_a_block_of_code_is_bounded_as_it_is_told_and_knows_no_modules() -> None:
    """The bound was taken and had no effect, and `vdnn-conv` moved nothing, both without a word."""
    returned = []
    for bound in (None, 1 << 16):
        model, x = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))), torch.randn(256, 64)
        options = {} if bound is None else {"max_inflight_bytes": bound}
        with vdnn.offload(device=vdnn.VirtualDevice(), min_bytes=1, **options) as offloader:
            loss = model(x).square().mean()
        loss.backward()
        returned.append(offloader.counts.returned_bytes)
    assert returned[0] == 0 < 4 * 256 * 64 * 4 < returned[1]
    with pytest.raises(UsageError, match="vdnn-conv goes by modules"):
        vdnn.offload("vdnn-conv", device=vdnn.VirtualDevice())
