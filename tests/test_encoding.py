"""Codes in a trace: which storages have one, and the step in which they stand for feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

import vdnn
from vdnn.analysis.encodable import encodable, refusals
from vdnn.analysis.encoding import encoded
from vdnn.analysis.liveness import requested
from vdnn.analysis.moments import Move, Points, resolve
from vdnn.errors import FormatError, PlanMismatchError
from vdnn.policies import Options, decide
from vdnn.sim import simulate_step
from vdnn.values import Encode, Entry, Offload, Plan, Trace, dumps, hardware, loads
from vdnn.values.codes import code_bytes

GPU = hardware("rtx4090")
EVERYTHING = Options(min_bytes=1, keep_soon=False)


class Everything(nn.Module):
    """Every code once, and a ReLU whose output a convolution saves, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8), nn.LeakyReLU(0.1), nn.AvgPool2d(2), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1),
            nn.MaxPool2d(2, dilation=3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.last = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x)
        y = y.masked_fill(y > 0.6, 0.5)
        return self.last(torch.native_dropout(y, 0.4, True)[0])


def traced(size: int = 40, device: str = "cpu") -> Trace:
    return vdnn.capture(Everything(), torch.randn(2, 3, size, size), device=device)


TRACE = traced()


def held(step: Trace, moves: Sequence[Move] = ()) -> int:
    """Bytes that forward leaves behind for backward, parameters and inputs aside."""
    fixed = sum(s.nbytes for s in step.storages if s.category in ("parameter", "buffer", "input"))
    return requested(step, moves)[step.forward_end - 1] - fixed


def by_node(trace: Trace) -> dict[tuple[str, str], set[str]]:
    codes = encodable(trace)
    found: dict[tuple[str, str], set[str]] = {}
    for t in trace.saved:
        found.setdefault((t.node, t.dtype), set()).add(codes.get(t.storage, ""))
    return found


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_nodes_that_save_a_storage_say_which_code_it_has(device: str) -> None:
    trace = traced(device=device)
    found = by_node(trace)
    assert found["ReluBackward0", "float32"] == {"sign", ""}, "the second ReLU's output is saved by a convolution, too"
    assert found["LeakyReluBackward0", "float32"] == {"positive"}
    assert found["MaxPool2DWithIndicesBackward0", "int64"] == {"index8"}
    assert found["AvgPool2DBackward0", "float32"] == {"shape"}
    assert found["MaskedFillBackward0", "bool"] == {"bits"}
    assert found["NativeDropoutBackward0", "bool"] == {"bits"}
    assert found["ConvolutionBackward0", "float32"] == {""}
    assert found["SigmoidBackward0", "float32"] == {""}, "an average pool reads its form alone, a sigmoid its values"


def test_an_index_that_reaches_too_far_for_a_byte_takes_two() -> None:
    def codes(pool: nn.Module, size: int) -> set[str]:
        trace = vdnn.capture(nn.Sequential(nn.Conv2d(3, 4, 1), pool), torch.randn(1, 3, size, size), device="cpu")
        found = encodable(trace)
        return {found.get(t.storage, "") for t in trace.saved if t.dtype == "int64"}

    assert codes(nn.MaxPool2d(2), 253) == {"index8"}
    assert codes(nn.MaxPool2d(2), 255) == {"index16"}
    assert codes(nn.MaxPool2d((2, 1), stride=2, dilation=(3, 1)), 85) == {"index8"}
    assert codes(nn.AdaptiveMaxPool2d(3), 9) == {""}, "its windows are not all alike"


def test_codes_cost_their_bytes_and_their_kernels_and_nothing_else_changes() -> None:
    plan = decide("encode", TRACE, GPU, EVERYTHING)
    step = encoded(TRACE, plan)
    kept = [op for op in step.ops if not op.name.startswith("vdnn.")]
    assert [(op.name, op.phase, op.module) for op in kept] == [(op.name, op.phase, op.module) for op in TRACE.ops]
    assert [str(name) for name in Points(step).names] == [str(name) for name in Points(TRACE).names]
    assert [(call.fqn, call.call) for call in step.modules] == [(call.fqn, call.call) for call in TRACE.modules]
    codes = [entry for entry in plan.entries if isinstance(entry.action, Encode)]
    assert len(codes) >= 7
    for entry in codes:
        assert isinstance(entry.action, Encode)
        storage = step.storages[step.saved[Points(step).find(entry.saved[0])].storage]
        size = {"float32": 4, "int64": 8, "bool": 1}[entry.saved[0].dtype]
        assert storage.nbytes == code_bytes(entry.action.how, entry.storage_bytes // size)
    base, ours = simulate_step(TRACE, None, GPU), simulate_step(TRACE, plan, GPU)
    assert held(step) < held(TRACE) / 2
    assert ours.iteration_time_ns > base.iteration_time_ns
    assert ours.offloaded_bytes == 0


def test_without_codes_the_step_is_the_trace_itself() -> None:
    assert encoded(TRACE, None) is TRACE
    assert encoded(TRACE, decide("vdnn-all", TRACE, GPU)) is TRACE


def test_codes_that_leave_are_small_and_come_back() -> None:
    plan = decide("encode-offload", TRACE, GPU, EVERYTHING)
    alone = decide("vdnn-all", TRACE, GPU, EVERYTHING)
    step = encoded(TRACE, plan)
    moves = resolve(plan, step)
    assert sum(move.nbytes for move in moves) == plan.offloaded_bytes < alone.offloaded_bytes
    assert any(isinstance(e.action, Encode) and e.action.release_at for e in plan.entries)
    assert all(move.fetch is not None for move in moves)
    assert held(step, moves) < held(TRACE) / 2
    with pytest.raises(PlanMismatchError, match="make the plan from this trace"):
        resolve(plan, TRACE)


def test_a_plan_with_codes_is_the_same_after_a_file() -> None:
    for policy in ("encode", "encode-offload"):
        plan = decide(policy, TRACE, GPU, EVERYTHING)
        assert loads(dumps(plan), "plan") == plan


def changed(plan: Plan, code: str, **action: str) -> Plan:
    """The plan with another action for the first storage that has this code."""
    entries = list(plan.entries)
    place = next(i for i, e in enumerate(entries) if isinstance(e.action, Encode) and e.action.how == code)
    entries[place] = replace(entries[place], action=replace(entries[place].action, **action))
    return replace(plan, entries=tuple(entries))


def test_a_code_that_is_not_enough_for_a_reader_is_refused() -> None:
    plan = decide("encode", TRACE, GPU, EVERYTHING)
    with pytest.raises(PlanMismatchError, match="LeakyReluBackward0 needs more of it than the code 'sign' keeps"):
        encoded(TRACE, changed(plan, "positive", how="sign"))
    conv = next(t for t in TRACE.saved if t.node == "ConvolutionBackward0" and TRACE.storages[t.storage].alloc >= 0)
    assert "ConvolutionBackward0 needs more" in refusals(TRACE, {conv.storage: "sign"})[conv.storage]
    parameter = next(t for t in TRACE.saved if TRACE.storages[t.storage].category == "parameter")
    assert "not a feature map" in refusals(TRACE, {parameter.storage: "sign"})[parameter.storage]


def test_a_plan_that_is_wrong_is_named() -> None:
    plan = decide("encode", TRACE, GPU, EVERYTHING)
    plan.check()
    for wrong, message in [
        (changed(plan, "sign", how="half"), "there is no code 'half'"),
        (changed(plan, "sign", how="bits"), "is not for float32"),
        (changed(plan, "sign", prefetch_at="unpack layers.1#0/0"), "never leaves"),
        (changed(plan, "shape", release_at="end #0"), "nothing to offload"),
        (changed(plan, "sign", release_at="unpack layers.1#0/0"), "not in forward"),
    ]:
        with pytest.raises(FormatError, match=message):
            wrong.check()


def test_nothing_comes_again_from_a_code() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.Sigmoid(), nn.AvgPool2d(2))
    trace = vdnn.capture(model, torch.randn(2, 3, 20, 20), device="cpu")
    again = decide("recompute", trace, GPU, EVERYTHING)
    source = next(e.action.source for e in again.entries if e.action.action == "recompute")
    entries = [replace(e, action=Encode("sign")) if source in map(str, e.saved) else e for e in again.entries]
    with pytest.raises(FormatError, match="of which only a code is kept"):
        replace(again, entries=tuple(entries)).check()


def test_an_entry_that_leaves_out_a_tensor_of_its_storage() -> None:
    plan = decide("encode", TRACE, GPU, EVERYTHING)
    entries = list(plan.entries)
    place = next(i for i, e in enumerate(entries) if isinstance(e.action, Encode) and len(e.saved) > 1)
    entries[place : place + 1] = [Entry(entries[place].saved[:1], entries[place].storage_bytes, Encode("sign"))]
    with pytest.raises(PlanMismatchError, match="leaves out"):
        encoded(TRACE, replace(plan, entries=tuple(entries)))
    assert not any(isinstance(e.action, Offload) for e in plan.entries)
