"""Blocks that the engine runs again in backward: the same bits, predicted memory, and nothing dropped on a guess."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import vdnn
from tests.engine.steps import EVERYTHING, GPU, again, or_error, planned, same, trained
from vdnn.analysis.blocks import blocked, blocks, repeated
from vdnn.engine import Schedule, VirtualDevice, engine_of
from vdnn.errors import DeviceOutOfMemory, FormatError, PlanMismatchError
from vdnn.policies import decide
from vdnn.values import Encode, Keep, Offload, Plan, Recompute, dumps, loads


class Residual(nn.Module):
    """Convolutions with norms, an activation in place, dropout, and a sum that is no module's output."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.one, self.norm, self.act = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(True)
        self.drop, self.two = nn.Dropout(0.3), nn.Conv2d(width, width, 1)
        self.way, self.runs = "", deque[int]()  # a list would be put back when a block runs again

    def forward(self, x: torch.Tensor, scale: float = 1.0, *, shift: torch.Tensor | None = None) -> torch.Tensor:
        if self.way == "changes":
            with torch.no_grad():
                x.mul_(2)
        y = self.act(self.norm(self.one(x)))
        if self.way == "fails" and torch.is_grad_enabled() and self.again():
            raise OSError("no mood")
        y = self.two(self.drop(y)) * scale
        if self.way == "other" and self.again():
            return self.two(self.one(y)[:1])
        return torch.tanh(x + y if shift is None else x + y * shift)

    def again(self) -> bool:
        self.runs.append(0)
        return len(self.runs) > 1


class Net(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList([Residual() for _ in range(depth)])
        self.head = nn.Conv2d(8, 2, 1)
        self.keywords = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        shift = y.mean().sigmoid() if self.keywords else None
        for block in self.blocks:
            y = block(y, 0.5, shift=shift) if self.keywords else block(y)
        return self.head(y)


def made(**attributes: Any) -> tuple[Net, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 3, 12, 12)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model, x


def measured(model: nn.Module, x: torch.Tensor, device: VirtualDevice) -> int:
    """The peak of one step, of which the account has seen every parameter before."""
    with device:
        trained(model, x, 1)
        model.zero_grad()
        device.account.reset_peak()
        out = model(x)
        out.sum().backward()
    device.finish()
    return device.peak_bytes


@pytest.mark.parametrize("how", ["plain", "evaluation", "autocast", "keywords", "channels last"])
def test_every_bit_is_the_same_random_numbers_and_statistics_too(how: str) -> None:
    outcomes = []
    for ours in (False, True):
        model, x = made(keywords=how == "keywords")
        if how == "evaluation":
            model.eval()
        if how == "channels last":
            model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            if ours:
                vdnn.wrap(model, policy="recompute-blocks", device=VirtualDevice(seed=2), min_bytes=1, keep_soon=False)
            outcomes.append(trained(model, x))
    assert same(*outcomes)
    engine = engine_of(model)
    assert engine.last is not None
    assert engine.last.plan is not None
    plan, counts = engine.last.plan, engine.offloader.counts
    assert not counts.mismatches
    assert len(again(plan)) >= 3 * (2 if how == "evaluation" else 4)
    assert counts.dropped_storages == counts.recomputed_storages == 3 * len(again(plan))


def test_the_memory_is_the_predicted_one_and_the_plan_is_the_same_after_a_file() -> None:
    model, x = made()
    trace = vdnn.capture(model, x, device="cpu")
    plan = decide("recompute-blocks", trace, GPU, EVERYTHING)
    assert loads(dumps(plan), "plan") == plan
    assert len(repeated(trace)) == 3
    device = VirtualDevice()
    vdnn.wrap(model, plan=plan, device=device)
    peak = measured(model, x, device)
    predicted = vdnn.simulate(trace, plan, hardware="rtx4090")
    baseline = vdnn.simulate(trace, None, hardware="rtx4090")
    assert peak == predicted.peak_requested_bytes < baseline.peak_requested_bytes
    assert predicted.iteration_time_ns is not None
    assert baseline.iteration_time_ns is not None
    assert predicted.iteration_time_ns > baseline.iteration_time_ns


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision:resnet18", "hf:gpt2", "timm:convnext_atto", "torchvision:densenet121"])
def test_the_peak_of_a_real_model_is_the_predicted_one(name: str) -> None:
    options = (
        {"layers": 3, "sequence": 32, "hidden": 64, "vocabulary": 101} if name == "hf:gpt2" else {"image_size": 64}
    )
    work = vdnn.load(name, batch=2, **options)
    result = vdnn.run(work, "recompute-blocks", GPU, device="virtual", steps=2, min_bytes=1)
    assert result.exact
    assert result.measured.peak_requested_bytes == result.predicted.peak_requested_bytes


def test_a_block_leaves_its_inputs_may_leave_and_codes_stand_for_the_rest() -> None:
    """One plan with all actions: the first block runs again, its input is offloaded, masks and signs are encoded."""
    outcomes = []
    for ours in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(Net(), nn.ReLU(), nn.MaxPool2d(2)), torch.randn(2, 3, 12, 12)
        if ours:
            trace = vdnn.capture(model, x, device="cpu")
            again_, coded, moved = (
                decide(policy, trace, GPU, EVERYTHING) for policy in ("recompute-blocks", "encode", "vdnn-all")
            )
            entries = []
            for one, code, move in zip(again_.entries, coded.entries, moved.entries, strict=True):
                action = one.action
                if isinstance(action, Recompute) and action.block != "0.blocks.0#0":
                    action = Keep()
                if isinstance(action, Keep) and not isinstance(code.action, Keep):
                    action = code.action
                sources = {a.source for a in again(again_)}
                if isinstance(action, Keep) and sources & set(map(str, one.saved)):
                    action = move.action
                entries.append(replace(one, action=action))
            plan = replace(again_, entries=tuple(entries))
            plan.check()
            assert {type(entry.action) for entry in plan.entries} == {Keep, Recompute, Encode, Offload}
            device = VirtualDevice(seed=5)
            vdnn.wrap(model, plan=plan, device=device)
        outcomes.append(trained(model, x))
        if ours:
            assert not vdnn.report(model).mismatches
            assert measured(model, x, device) == vdnn.simulate(trace, plan, hardware="rtx4090").peak_requested_bytes
    assert same(*outcomes)


def test_a_block_that_changes_its_input_is_kept() -> None:
    outcomes = []
    for ours in (False, True):
        model, x = made()
        if ours:
            vdnn.wrap(model, plan=planned(model, x, "recompute-blocks"), device=VirtualDevice())
        model.blocks[1].way = "changes"  # type: ignore[assignment]
        outcomes.append(or_error(lambda model=model, x=x: trained(model, x, 1)))
    assert isinstance(outcomes[0], list) == isinstance(outcomes[1], list)
    if isinstance(outcomes[0], list):
        assert same(*outcomes)  # type: ignore[arg-type]
    else:
        assert outcomes[0] == outcomes[1]
    assert any("changes its input" in text for text in vdnn.report(model).mismatches)


@pytest.mark.parametrize("why", ["source", "weight"])
def test_what_was_changed_since_raises(why: str) -> None:
    model, x = made()
    seen: list[torch.Tensor] = []
    vdnn.wrap(model, plan=planned(model, x, "recompute-blocks"), device=VirtualDevice())
    model.stem.register_forward_hook(lambda m, a, o: seen.append(o))
    out = model(x).sum()
    with torch.no_grad():
        (seen[0] if why == "source" else model.blocks[2].one.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize(("way", "error"), [("fails", "no mood"), ("other", "does not pack|packs .* where it packed")])
def test_a_block_that_does_something_else_in_backward_leaves_nothing_behind(way: str, error: str) -> None:
    expected = trained(*made(), 1)
    model, x = made()
    device = VirtualDevice()
    vdnn.wrap(model, plan=planned(model, x, "recompute-blocks"), device=device)
    model.blocks[1].way = way  # type: ignore[assignment]
    torch.manual_seed(0)
    if way == "other":
        model.blocks[1].two.register_forward_pre_hook(lambda m, a: None)
        _ = model(x)
        assert any("forward hooks" in text for text in vdnn.report(model).mismatches)
        return
    out = model(x).sum()
    with pytest.raises(OSError, match=error):
        out.backward()
    del out
    model.load_state_dict(made()[0].state_dict())
    model.blocks[1].way = ""  # type: ignore[assignment]
    assert same(trained(model, x, 1), expected)


def test_backward_twice_and_of_the_gradient() -> None:
    outcomes = []
    for ours in (False, True):
        model, x = made()
        x.requires_grad_()
        if ours:
            vdnn.wrap(model, plan=planned(model, x, "recompute-blocks"), device=VirtualDevice(seed=4))
        torch.manual_seed(2)
        out = model(x).square().mean()
        (first,) = torch.autograd.grad(out, x, create_graph=True)
        first.square().sum().backward(retain_graph=True)
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        out.backward()
        outcomes.append([first.detach(), *found, *(p.grad for p in model.parameters() if p.grad is not None), x.grad])
    assert same(*outcomes)


def test_no_room_to_run_again_is_out_of_memory_and_it_may_be_tried_again() -> None:
    expected = trained(*made(), 1)
    model, x = made()
    device = VirtualDevice(memory="1GiB")
    vdnn.wrap(model, plan=planned(model, x, "recompute-blocks"), device=device)
    with device:
        torch.manual_seed(0)
        out = model(x)
        loss = out.square().mean()
        device.account.limit_bytes = device.account.live_bytes()
        with pytest.raises(DeviceOutOfMemory):
            loss.backward(retain_graph=True)
        model.zero_grad()
        device.account.limit_bytes = 1 << 30
        loss.backward()
        got = [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    assert same(got, expected[: len(got)])


def test_nothing_grows() -> None:
    model, x = made()
    device = VirtualDevice()
    vdnn.wrap(model, plan=planned(model, x, "recompute-blocks"), device=device)
    live = []
    with device:
        for _ in range(12):
            trained(model, x, 1)
            model(x)  # a graph that is dropped
            live.append(device.account.live_bytes())
    assert live[-1] == live[3]


def test_plans_that_are_wrong_are_named() -> None:
    model, x = made()
    trace = vdnn.capture(model, x, device="cpu")
    plan = decide("recompute-blocks", trace, GPU, EVERYTHING)
    place = next(i for i, e in enumerate(plan.entries) if isinstance(e.action, Recompute))

    def changed(**fields: Any) -> Plan:
        entries = list(plan.entries)
        entries[place] = replace(entries[place], action=replace(entries[place].action, **fields))
        return replace(plan, entries=tuple(entries))

    with pytest.raises(FormatError, match="name one of them"):
        changed(block="blocks.0.act#0").check()
    with pytest.raises(FormatError, match="not both"):
        changed(through=("blocks.0.act#0",)).check()
    with pytest.raises(FormatError, match="is not saved inside"):
        changed(block="blocks.2#0", source=next(a.source for a in again(plan) if a.block == "blocks.2#0")).check()
    with pytest.raises(FormatError, match="from which"):
        changed(source="stem#0/0").check()
    with pytest.raises(PlanMismatchError, match="nowhere"):
        blocked(trace, changed(block="nowhere#0"))
    with pytest.raises(PlanMismatchError, match="nowhere"):
        Schedule(changed(block="nowhere#0")).check_names({name for name, _ in model.named_modules()})


def test_what_cannot_run_again_is_no_block() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.conv = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.act(x))

    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), Changing(), Changing())
    assert blocks(vdnn.capture(model, torch.randn(2, 3, 5, 5), device="cpu")) == {}


class Shared(nn.Module):
    """Blocks that call one module that is nobody's part but the network's: CoaT's encoding of positions."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(8, 8, 1), nn.GELU()

        def forward(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
            return self.act(norm(self.conv(x)))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList([self.Block(), self.Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, self.norm)
        return x


def test_a_block_that_calls_what_is_not_its_own_stays() -> None:
    """The module's statistics would be counted twice: they are not the block's to put back."""
    outcomes = []
    for ours in (False, True):
        torch.manual_seed(0)
        model, x = Shared(), torch.randn(2, 3, 12, 12)
        if ours:
            assert blocks(vdnn.capture(model, x, device="cpu")) == {}
            vdnn.wrap(model, policy="recompute-blocks", device=VirtualDevice(seed=2), min_bytes=1, keep_soon=False)
        outcomes.append(trained(model, x))
    assert same(*outcomes)
