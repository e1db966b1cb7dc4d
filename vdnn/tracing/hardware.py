"""What torch would run differently if there were a GPU: attention and recurrent layers, and more on CPU tensors.

Fake CUDA tensors need a CUDA build of torch. Without one (and where an op asks for the driver) the step runs on
fake CPU tensors, with dropout, batch norm and autocast as CUDA has them.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from vdnn.tracing import attention, autocast, hidden, onednn, rnn
from vdnn.tracing.attention import attend, attend_in_parts

__all__ = ["as_on_cuda", "rules", "said"]

_ATEN: Any = torch.ops.aten
_VF: Any = importlib.import_module("torch._VF")
_DROPOUT: Any = torch.dropout
_BATCH_NORM: Any = torch.batch_norm
_RMS_NORM: Any = torch.rms_norm
_CUDNN_BATCH = 880801  # largest batch of cuDNN's batch norm in training


def said(place: str, amp: bool, recurrent: bool, math: bool = False) -> list[str]:
    """What a trace must say about a CUDA step captured on fake tensors of `place`."""
    found = [attention.SAID_MATH if math else attention.SAID]
    found.append(hidden.SAID)
    if recurrent:
        found.append(rnn.SAID)
    if place == "cpu":
        found.append("captured on CPU tensors with CUDA's dropout, batch norm and layout of saved tensors")
        if amp:
            found.append(autocast.SAID)
    return found


class _Sent(TorchFunctionMode):
    def __init__(self, replaced: dict[Any, Any]) -> None:
        super().__init__()
        self.replaced = replaced

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.replaced.get(func, func)(*args, **(kwargs or {}))


def rules(place: str, device: str) -> dict[Any, Any]:
    """Ops for which torch has no rule for fakes, or another than the device's."""
    if device != "cuda":
        return onednn.RULES
    return rnn.RULES | _RULES_ON_CPU if place == "cpu" else rnn.RULES


@contextlib.contextmanager
def as_on_cuda(place: str, amp: bool, math: bool = False) -> Iterator[None]:
    """Calls go where CUDA would send them. A mode for what the model calls, patches for torch's own Python code."""
    attended = attend_in_parts if math else attend
    replaced = {F.scaled_dot_product_attention: attended, **rnn.REPLACED}
    with contextlib.ExitStack() as stack:
        if place == "cpu":
            replaced |= {_DROPOUT: _dropout, _BATCH_NORM: _batch_norm, _RMS_NORM: _rms_norm}
            stack.enter_context(mock.patch.object(_VF, "dropout", _dropout, create=True))
            stack.enter_context(mock.patch.object(torch, "batch_norm", _batch_norm))
            stack.enter_context(mock.patch.object(torch, "rms_norm", _rms_norm))
            if amp:
                stack.enter_context(autocast.cuda_lists_on_cpu())
            stack.enter_context(mock.patch.object(torch.autocast, "__init__", _meant_for_cuda))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attended))
        stack.enter_context(_Sent(replaced))
        yield


_INIT: Any = torch.autocast.__init__


def _meant_for_cuda(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
    _INIT(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _dropout(x: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    if not train or not 0 < p < 1 or not x.numel():
        made: torch.Tensor = _DROPOUT(x, p, train)
        return made
    return torch.native_dropout(x, p, True)[0]


def _batch_norm(
    x: torch.Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> torch.Tensor:
    whole = weight is not None and bias is not None and (mean is not None or training)
    dtypes = weight is not None and weight.dtype is torch.float32 and x.dtype is not torch.float64
    if cudnn and whole and dtypes and training and x.dim() >= 3 and x.shape[0] <= _CUDNN_BATCH and eps >= 1e-5:
        # inside it torch makes the input contiguous, and weights for a low-precision input are fp32
        made: torch.Tensor = _ATEN.cudnn_batch_norm(x, weight, bias, mean, var, training, momentum, eps)[0]
        return made
    plain: torch.Tensor = _BATCH_NORM(x, weight, bias, mean, var, training, momentum, eps, cudnn)
    return plain


def _rms_norm(x: torch.Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> torch.Tensor:
    made: torch.Tensor = _ATEN._fused_rms_norm(x, shape, weight, eps)[0]
    return made


def _statistics_in_fp32(func: Any) -> Callable[[tuple[Any, ...]], Any]:
    """CUDA's norms keep mean and deviation of low-precision tensors in fp32, the CPU's as they come."""

    def run(args: tuple[Any, ...]) -> Any:
        out, mean, deviation, *rest = func(*args)
        if out.dtype in (torch.float16, torch.bfloat16):
            mean, deviation = (
                torch.empty_like(mean, dtype=torch.float32),
                torch.empty_like(deviation, dtype=torch.float32),
            )
        return out, mean, deviation, *rest

    return run


_RULES_ON_CPU: dict[Any, Any] = {
    func: _statistics_in_fp32(func)
    for func in (_ATEN.native_layer_norm.default, _ATEN.native_batch_norm.default, _ATEN.cudnn_batch_norm.default)
}
