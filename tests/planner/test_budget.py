"""A plan for a budget fits, here and on the device, and moves no more than it must."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vdnn
from vdnn.analysis.liveness import least_peak
from vdnn.analysis.synthetic import conv_chain, transformer_chain
from vdnn.errors import InfeasibleError, UsageError
from vdnn.planner import plan_for_budget
from vdnn.policies import Options
from vdnn.training import train
from vdnn.units import format_at_least, parse_size
from vdnn.values import hardware

# of traces of some MiB, cuBLAS' workspaces would be the most
MACHINE = replace(hardware("rtx4090"), cublas_workspace_bytes=0)
TRACES = {"conv": conv_chain(batch=512), "transformer": transformer_chain(blocks=6, batch=64)}


@pytest.mark.case(60)
@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("percent", [90, 60, 30])
def test_the_plan_fits_its_budget_and_keeps_what_the_budget_allows(name: str, percent: int) -> None:
    trace = TRACES[name]
    options = Options(min_bytes=1)
    most = vdnn.simulate(trace, hardware=MACHINE).peak_requested_bytes
    least = least_peak(trace)
    assert most is not None
    budget = least + (most - least) * percent // 100
    plan = plan_for_budget(trace, MACHINE, budget, options)
    result = vdnn.simulate(trace, plan, MACHINE, memory_limit=budget)
    assert result.fits
    assert result.peak_requested_bytes is not None
    assert result.peak_requested_bytes <= budget
    assert plan.budget_bytes == budget
    assert any(e.action.action != "keep" for e in plan.entries)
    if percent >= 60:
        assert any("the budget does not ask for it" in e.action.why for e in plan.entries if e.action.action == "keep")


@pytest.mark.case(53, 60)
def test_a_budget_that_needs_nothing_moves_nothing() -> None:
    plan = plan_for_budget(TRACES["conv"], MACHINE, 1 << 40, Options(min_bytes=1))
    assert plan.offloaded_bytes == 0
    assert "without offload" in plan.notes[0]


def test_an_impossible_budget_names_the_least_and_what_fills_it() -> None:
    with pytest.raises(InfeasibleError, match=r"the least is .* filled by .*; give that budget, or a smaller batch"):
        plan_for_budget(TRACES["transformer"], MACHINE, 1 << 10, Options(min_bytes=1))
    with pytest.raises(UsageError, match="holds nothing"):
        plan_for_budget(TRACES["transformer"], MACHINE, 0)
    with pytest.raises(UsageError, match="both the policy vdnn-all and a budget"):
        vdnn.plan(TRACES["conv"], MACHINE, "vdnn-all", budget="1GiB")


@given(st.integers(1, 1 << 45))
def test_a_budget_that_an_error_names_is_no_less_when_it_is_given(size: int) -> None:
    """Rounded as other sizes are, half of them were refused once more, with the same words."""
    assert size <= parse_size(format_at_least(size)) <= size * 1.1


@pytest.mark.case(60, 61)
@pytest.mark.parametrize(
    ("name", "batch", "options"),
    [
        ("demo:cnn", 8, {}),
        ("demo:transformer", 4, {}),
        ("torchvision:resnet18", 4, {"image_size": 64}),
        ("hf:gpt2", 2, {"layers": 3, "hidden": 64, "sequence": 64, "vocabulary": 101}),
    ],
)
def test_the_budget_holds_on_a_virtual_device(name: str, batch: int, options: dict[str, object]) -> None:
    work = vdnn.load(name, batch=batch, **options)
    trace = vdnn.capture(work, device="cpu", optimizer="sgd")
    most = vdnn.simulate(trace).peak_requested_bytes
    assert most is not None
    room = most - least_peak(trace)
    plain = train(work, None, "virtual", MACHINE, steps=2, optimizer="sgd")
    assert plain.result.peak_requested_bytes == most
    for percent in (80, 50):
        budget = most - room + room * percent // 100
        plan = vdnn.plan(trace, MACHINE, budget=budget, min_bytes=1)
        predicted = vdnn.simulate(trace, plan, MACHINE)
        done = train(work, plan, "virtual", MACHINE, steps=2, optimizer="sgd", expected=plain.steps)
        assert done.differs == ""
        assert done.result.peak_requested_bytes <= budget
        assert done.result.peak_requested_bytes == pytest.approx(predicted.peak_requested_bytes, rel=0.001)


# -- wrap alone ----------------------------------------------------------------------------------


def steps(model: torch.nn.Module, work, number: int = 2) -> list[torch.Tensor]:
    found = []
    for step in range(number):
        torch.manual_seed(step)
        args, kwargs = work.inputs("cpu")
        loss = work.loss(model(*args, **kwargs), work.targets("cpu"))
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        model.zero_grad(set_to_none=True)
    return found


def test_wrap_alone_moves_nothing_where_the_step_fits(caplog: pytest.LogCaptureFixture) -> None:
    work = vdnn.load("demo:cnn", batch=4)
    model = work.build()
    with caplog.at_level("INFO", "vdnn"):
        vdnn.wrap(model, device=vdnn.VirtualDevice(memory="8GiB"))
        steps(model, work)
    assert vdnn.report(model).offloaded_bytes == 0
    (line,) = [r.message for r in caplog.records]
    assert "nothing is offloaded; the step fits into 8.00 GiB without offload" in line


def test_wrap_alone_offloads_what_it_takes_to_fit(caplog: pytest.LogCaptureFixture) -> None:
    work = vdnn.load("demo:cnn", batch=8)
    torch.manual_seed(0)
    model = work.build()
    expected = steps(model, work)
    peak = vdnn.simulate(vdnn.capture(work, device="cpu")).peak_requested_bytes
    assert peak is not None
    device = vdnn.VirtualDevice(memory=peak * 8 // 10, d2h="200GB/s", h2d="200GB/s")  # faster than recomputation
    with caplog.at_level("INFO", "vdnn"):
        vdnn.wrap(model, device=device, optimizer="none")
        got = steps(model, work)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    report = vdnn.report(model)
    everything = vdnn.plan(vdnn.capture(work, device="cpu")).offloaded_bytes
    assert 0 < report.offloaded_bytes // 2 < everything
    (line,) = [r.message for r in caplog.records]
    assert "policy budget: offload is active: " in line
    assert "saved storages" in line


def test_wrap_with_a_budget_that_nothing_fits_says_so_at_the_first_call() -> None:
    work = vdnn.load("demo:cnn", batch=2)
    model = work.build()
    vdnn.wrap(model, budget="1MiB", device=vdnn.VirtualDevice())
    with pytest.raises(InfeasibleError, match="no plan found fits SmallCnn"):
        steps(model, work)
    vdnn.unwrap(model)
    assert len(steps(model, work, 1)) > 1


def test_wrap_is_told_one_thing_only() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match="policy and budget are both given"):
        vdnn.wrap(model, "vdnn-all", budget="1GiB", device=vdnn.VirtualDevice())
    with pytest.raises(UsageError, match="unknown optimizer 'adam': did you mean adamw"):
        vdnn.wrap(model, optimizer="adam", device=vdnn.VirtualDevice())
    with pytest.raises(UsageError, match="did you mean min_bytes"):
        vdnn.wrap(model, min_byte=3, device=vdnn.VirtualDevice())


@pytest.mark.case(60)
def test_another_shape_is_planned_anew_and_the_same_is_not() -> None:
    work, larger = vdnn.load("demo:cnn", batch=2), vdnn.load("demo:cnn", batch=5)
    model = work.build()
    vdnn.wrap(model, "vdnn-all", device=vdnn.VirtualDevice(), min_bytes=1, keep_soon=False)
    steps(model, work, 1)
    first = vdnn.report(model).offloaded_bytes
    steps(model, larger, 1)
    second = vdnn.report(model).offloaded_bytes - first
    steps(model, work, 1)
    third = vdnn.report(model).offloaded_bytes - first - second
    assert first == third
    assert second > 2 * first
    assert vdnn.report(model).mismatches == ()


def test_every_preset_is_found_by_its_own_name_and_strangers_are_not() -> None:
    from vdnn.measuring.recognition import recognised
    from vdnn.values import preset_ids

    for gpu in preset_ids():
        found = recognised(hardware(gpu).name, 123)
        assert found is not None, gpu
        assert found.id == gpu
        assert found.memory_bytes == 123
    for name in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce GTX 1080", "NVIDIA L40S", "Tesla M40"):
        assert recognised(name, 1) is None, name
