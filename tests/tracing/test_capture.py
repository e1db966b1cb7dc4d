"""Capture: lifetimes, flops and bytes counted by hand; what a step of a GPU saves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vdnn.models
from vdnn.errors import CaptureError, UsageError
from vdnn.tracing import capture_model, capture_work
from vdnn.values import Trace


def live(trace: Trace) -> np.ndarray:
    steps = np.zeros(len(trace.ops) + 1, dtype=np.int64)
    for s in trace.storages:
        steps[max(s.alloc, 0)] += s.nbytes
        steps[s.free] -= s.nbytes
    return np.cumsum(steps)[:-1]


def test_lifetimes_of_a_tiny_network_are_those_counted_by_hand() -> None:
    """Linear(4, 8), ReLU, Linear(8, 2) on 16 rows: ReLU's output is saved twice, by ReLU and by the second Linear."""
    trace = capture_model(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(16, 4),), device="cpu"
    )
    hidden = 16 * 8 * 4
    (relu,) = {t.storage for t in trace.saved if trace.storages[t.storage].category == "activation"}
    s = trace.storages[relu]
    assert s.nbytes == hidden
    assert s.alloc < s.release <= trace.forward_end <= s.need < s.free < len(trace.ops)
    assert [trace.modules[t.module].fqn for t in trace.saved if t.storage == relu] == ["1", "2"]
    assert sum(s.nbytes for s in trace.storages if s.category == "parameter") == (4 * 8 + 8 + 8 * 2 + 2) * 4
    assert {s.held for s in trace.storages if s.category == "input"} == {"input"}


def test_flops_of_convolutions_are_those_of_the_formula() -> None:
    for conv, size in (
        (nn.Conv2d(8, 16, 3, padding=1), (8, 10, 10)),
        (nn.Conv2d(8, 16, 3, padding=1, groups=4), (8, 10, 10)),
        (nn.Conv2d(8, 8, 3, stride=2, groups=8), (8, 11, 11)),
        (nn.Conv1d(4, 6, 5), (4, 20)),
        (nn.Conv3d(2, 4, 3), (2, 6, 6, 6)),
    ):
        x = torch.randn(2, *size, requires_grad=True)
        out = conv(x)
        forward = 2 * out.numel() * conv.in_channels // conv.groups * conv.weight[0, 0].numel()
        trace = capture_model(conv, (x,), device="cpu")
        found = {phase: sum(op.flops for op in trace.ops if op.phase == phase and op.kernel == "conv")
                 for phase in ("forward", "backward")}  # fmt: skip
        assert found == {"forward": forward, "backward": 2 * forward}


def test_a_convolution_says_that_its_input_was_left_channels_last() -> None:
    """As in ConvNeXt: a linear layer over the last dimension, permuted back."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=8)
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return torch.as_tensor(self.last(y))

    trace = capture_model(Mixed(), (torch.randn(2, 8, 9, 9),), device="cpu")
    found = [(op.phase, op.dims[6:]) for op in trace.ops if op.kernel == "conv"]
    assert found == [("forward", (81,)), ("forward", (49, 1)), ("backward", (49, 1)), ("backward", (81,))]


def test_a_transposed_convolution_counts_its_inputs() -> None:
    conv = nn.ConvTranspose2d(8, 4, 4, stride=2)
    trace = capture_model(conv, (torch.randn(2, 8, 5, 5),), device="cpu")
    forward = next(op for op in trace.ops if op.kernel == "conv")
    assert forward.flops == 2 * (2 * 8 * 5 * 5) * 4 * 16


def test_flops_of_matrix_products() -> None:
    trace = capture_model(nn.Linear(32, 8), (torch.randn(4, 32),), device="cpu")
    assert [op.flops for op in trace.ops if op.kernel == "matmul"] == [2 * 4 * 32 * 8] * 2  # no gradient of the input


@pytest.mark.skipif(torch.version.cuda is None, reason="a CPU-only torch cannot hold fake CUDA tensors")
def test_on_cuda_autograd_saves_what_a_gpu_saves() -> None:
    work = vdnn.models.load("torchvision:resnet18", batch=2, image_size=64)
    cuda, cpu = capture_work(work), capture_work(work, device="cpu")
    assert len(cuda.saved) - len(cpu.saved) == 20  # cuDNN's batch norm has its reserve
    assert any("cudnn_batch_norm" in op.name for op in cuda.ops)


@pytest.mark.skipif(torch.version.cuda is None, reason="a CPU-only torch cannot hold fake CUDA tensors")
def test_autocast_copies_of_weights_are_recognisable() -> None:
    trace = capture_work(vdnn.models.load("demo:transformer", batch=2), precision="amp")
    casts = [s.name for s in trace.storages if s.name.startswith("cast of ")]
    assert casts
    assert any("flash" in op.name for op in trace.ops if op.kernel == "attention")


@pytest.mark.parametrize(("optimizer", "states"), [("none", 0), ("sgd", 1), ("adamw", 2)])
def test_the_reported_step_is_the_second_with_the_optimizers_states(optimizer: str, states: int) -> None:
    model = nn.Linear(64, 64)
    trace = capture_model(model, (torch.randn(4, 64),), device="cpu", optimizer=optimizer)
    weights = sum(p.numel() * 4 for p in model.parameters())
    counters = 2 * 4 if optimizer == "adamw" else 0
    found = [s for s in trace.storages if s.category == "optimizer_state"]
    assert sum(s.nbytes for s in found) == states * weights + counters
    assert all(s.alloc == -1 and s.free == len(trace.ops) for s in found)
    assert model.weight.grad is None


def test_a_model_that_asks_for_a_value_is_named_with_its_module() -> None:
    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum().item() > 0 else x

    model = nn.Sequential(nn.Linear(4, 4), Asks())
    with pytest.raises(CaptureError, match=r"module 1 \(Asks\) asks for the value of a tensor"):
        capture_model(model, (torch.randn(2, 4),), device="cpu")


@pytest.mark.parametrize("wrong", [{"precision": "fp31"}, {"optimizer": "sdg"}, {"device": "cud"}])
def test_a_wrong_option_is_refused_with_the_nearest(wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="did you mean"):
        capture_model(nn.Linear(2, 2), (torch.randn(1, 2),), **wrong)


def dims_of(function, *inputs, op):
    """Dims of the first op of a name that a function of tensors runs."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, *given):
            return function(*given) * self.weight

    trace = capture_model(Module(), inputs)
    return next(o.dims for o in trace.ops if o.name.startswith(f"aten.{op}"))


def many(x: torch.Tensor) -> torch.Tensor:
    return x.repeat(1, 4, 1, 1)


def last(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("function", "op", "dims"),
    [
        (lambda x: F.layer_norm(x, (6,)), "native_layer_norm", (2 * 4 * 5 * 6, 6)),
        (lambda x: F.batch_norm(x, None, None, training=True), "native_batch_norm", (240, 4)),
        (lambda x: x.softmax(1), "_softmax", (240, 4, 30)),  # four numbers a row, 5 · 6 apart
        (lambda x: x.sum((2, 3)), "sum", (240, 8, 1)),
        (lambda x: x.mean(1), "mean", (240, 60, 30)),
        (lambda x: F.max_pool2d(x, 2), "max_pool2d", (240, 4, 7, 16)),  # rows of 6: 1 + 6; 2 · 6 + 2 · 2
        (lambda x: x.transpose(1, 3).contiguous(), "clone", (240, 1, 0)),  # nothing lies side by side in both
        (lambda x: x.transpose(1, 2).contiguous(), "clone", (240, 6, 0)),
        (lambda x: x + x.detach()[:1], "add", (240, 240, 1)),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), "upsample", (960, 960, 1, 8)),  # 2 · 4 planes
        (lambda x: F.interpolate(many(x), scale_factor=2, mode="bilinear"), "upsample", (3840, 3840, 1, 32)),
        (lambda x: F.interpolate(last(many(x)), scale_factor=2, mode="bilinear"), "upsample", (3840, 3840, 1)),
        (lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), "upsample", (960, 960, 1)),
    ],
)
def test_an_op_is_told_with_the_sizes_that_decide_its_speed(function, op, dims):
    assert dims_of(function, torch.zeros(2, 4, 5, 6), op=op) == dims


def test_a_foreach_op_writes_all_tensors_of_its_list():
    trace = capture_model(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7)), (torch.zeros(2, 3),), optimizer="sgd")
    parameters = 4 * (3 * 5 + 5 + 5 * 7 + 7)
    step = [op for op in trace.ops if op.name.startswith("aten._foreach_mul_")]
    assert [op.written_bytes for op in step] == [parameters]
