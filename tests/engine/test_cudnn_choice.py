"""What becomes of a plan's convolution algorithms in cuDNN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vdnn.analysis.synthetic import conv_chain
from vdnn.engine import choose_in_cudnn, what_cudnn_does
from vdnn.policies import Options, decide
from vdnn.values import Plan, hardware


def plan(policy: str, **options: object) -> Plan:
    trace = conv_chain(channels=(64, 64, 256, 256, 512, 512), batch=64, size=56)
    return decide(policy, trace, hardware("titan-x"), Options(algorithms="cudnn4", **options))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _as_it_was():  # type: ignore[no-untyped-def]
    before = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize(("policy", "benchmark"), [("vdnn-all-m", False), ("vdnn-all-p", True)])
@pytest.mark.parametrize("before", [False, True])
def test_benchmark_is_set_and_set_back(policy: str, benchmark: bool, before: bool) -> None:
    torch.backends.cudnn.benchmark = before
    undo = choose_in_cudnn(plan(policy))
    assert torch.backends.cudnn.benchmark is benchmark
    undo()
    assert torch.backends.cudnn.benchmark is before


def test_a_plan_that_leaves_it_to_the_library_touches_nothing() -> None:
    torch.backends.cudnn.benchmark = True
    choose_in_cudnn(replace(plan("vdnn-all-m"), workspace=""))
    assert torch.backends.cudnn.benchmark is True
    assert what_cudnn_does(replace(plan("vdnn-all-m"), workspace="")) == ""


def test_what_cannot_be_done_is_said() -> None:
    assert "cannot be asked for" in what_cudnn_does(plan("vdnn-conv-m"))
    assert "CUDNN_CONV_WSCAP_DBG" in what_cudnn_does(plan("vdnn-conv-m"))
    fastest = plan("vdnn-conv-p")
    assert what_cudnn_does(fastest).endswith("that the free memory allows")
    some = replace(fastest.convolutions[0], forward="implicit-gemm")
    mixed = replace(fastest, workspace="mixed", convolutions=(some, *fastest.convolutions[1:]))
    assert "the 1 downgraded ones are cuDNN's choice" in what_cudnn_does(mixed)
