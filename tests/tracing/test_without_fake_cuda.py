"""A CUDA step on fake CPU tensors, for torch built without CUDA: the same packs and kernels as on fake CUDA tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import vdnn.models
from vdnn.tracing import capture_model, capture_work, hardware
from vdnn.values import Trace

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="nothing to compare with: no fake CUDA tensors")

TEXT = {"layers": 1, "hidden": 128, "vocabulary": 100, "sequence": 24}
QUICK = [("torchvision:resnet18", {"image_size": 64}), ("demo:transformer", {}), ("hf:gpt2", TEXT)]
LONG = [
    ("torchvision:mobilenet_v3_small", {"image_size": 64}),
    ("torchvision:swin_t", {"image_size": 64}),
    ("torchvision:vit_b_16", {"image_size": 64}),
    ("torchvision:googlenet", {"image_size": 96}),
    ("torchvision:densenet121", {"image_size": 64}),
    ("hf:llama-1b", TEXT),
    ("hf:t5-small", TEXT),
    ("hf:bert-base", TEXT),
    ("hf:mixtral-small", TEXT),
]


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    with monkeypatch.context() as patch:
        yield patch


def packs(trace: Trace) -> list[Any]:
    return [(t.module, t.index, t.dtype, t.shape, t.stride, t.offset) for t in trace.saved]


def kernels(trace: Trace) -> list[Any]:
    return [(op.name, op.phase, op.module, op.dtype) for op in trace.ops if op.kernel != "view"]


@pytest.mark.parametrize("precision", ["fp32", "amp", "bf16"])
@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*m, id=m[0]) for m in QUICK] + [pytest.param(*m, id=m[0], marks=pytest.mark.slow) for m in LONG],
)
def test_packs_and_kernels_are_those_of_cuda(
    name: str, options: dict[str, Any], precision: str, no_cuda: pytest.MonkeyPatch
) -> None:
    work = vdnn.models.load(name, batch=2, **options)
    there = capture_work(work, precision=precision)
    no_cuda.setattr(torch.version, "cuda", None)
    here = capture_work(work, precision=precision)
    assert packs(here) == packs(there)
    assert kernels(here) == kernels(there)
    assert here.device == "cuda"
    assert here.corrections[0] == "this torch is built without CUDA"
    assert any("CUDA's dropout" in said for said in here.corrections)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = kind(8, 16, num_layers=2, batch_first=True, bidirectional=True, dropout=0.1, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


@pytest.mark.parametrize(
    ("kind", "options", "gates"),
    [(nn.LSTM, {}, 4), (nn.LSTM, {"proj_size": 4}, 4), (nn.GRU, {"bias": False}, 3), (nn.RNN, {}, 1)],
)
@pytest.mark.parametrize("precision", ["fp32", "amp"])
def test_a_recurrent_layer_is_one_op_each_way(
    kind: type[nn.RNNBase], options: dict[str, Any], gates: int, precision: str, no_cuda: pytest.MonkeyPatch
) -> None:
    """Per time step, sequence, layer and direction: gates × hidden × (input + recurrent) products."""
    there = capture_model(Recurrent(kind, **options), (torch.randn(3, 5, 8),), precision=precision, optimizer="sgd")
    ops = [op for op in there.ops if op.kernel == "rnn"]
    assert [op.phase for op in ops] == ["forward", "backward"]
    out = options.get("proj_size", 16)
    first, second = 8 + out, 2 * out + out
    flops = 2 * 3 * 5 * 2 * gates * 16 * (first + second)
    if "proj_size" in options:
        flops += 2 * 3 * 5 * 2 * 2 * 16 * out
    assert ops[0].flops == flops
    assert ops[1].flops == 2 * flops - 2 * 3 * 5 * 2 * gates * 16 * 8  # no gradient of the input
    assert any("reserve" in said for said in there.corrections)
    (weights,) = [s for s in there.storages if s.category == "parameter"]
    assert weights.nbytes == 4 * sum(p.numel() for p in Recurrent(kind, **options).parameters())
    no_cuda.setattr(torch.version, "cuda", None)
    here = capture_model(Recurrent(kind, **options), (torch.randn(3, 5, 8),), precision=precision, optimizer="sgd")
    assert packs(here) == packs(there)
    assert kernels(here) == kernels(there)


def test_a_packed_sequence_is_refused_with_a_way_out() -> None:
    class Packs(Recurrent):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 4, 3]), batch_first=True)
            return self.layer(packed)[0].data

    with pytest.raises(vdnn.errors.CaptureError, match=r"layer|Packs"):
        capture_model(Packs(nn.LSTM), (torch.randn(3, 5, 8),))


def test_an_op_that_asks_for_the_driver_sends_the_whole_step_to_the_cpu() -> None:
    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.is_cuda:
                raise RuntimeError("Found no NVIDIA driver on your system.")
            return nn.functional.dropout(x, 0.5)

    trace = capture_model(nn.Sequential(nn.Linear(8, 8), Asks()), (torch.randn(2, 8),))
    assert trace.device == "cuda"
    assert trace.corrections[0] == "an op asks for the driver (in module 1 (Asks), after op aten.addmm.default)"
    assert next(op.name for op in trace.ops if "dropout" in op.name) == "aten.native_dropout.default"


def test_autocast_of_the_cpu_is_its_own_again(no_cuda: pytest.MonkeyPatch) -> None:
    def dtypes() -> list[torch.dtype]:
        x = torch.ones(4, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return [torch.exp(x.bfloat16()).dtype, torch.mm(x, x).dtype, torch.stack([x, x.bfloat16()]).dtype]

    before = dtypes()
    no_cuda.setattr(torch.version, "cuda", None)
    capture_model(nn.Linear(8, 8), (torch.randn(2, 8),), precision="amp")
    assert dtypes() == before
    assert not hasattr(hardware.torch.batch_norm, "__wrapped__")
    assert torch.batch_norm.__module__ is None or "vdnn" not in str(torch.batch_norm.__module__)
