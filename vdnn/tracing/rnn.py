"""Recurrent layers as cuDNN runs them: one op forward and one backward, with a reserve that forward leaves.

torch asks the driver before it calls cuDNN, and has no rule for fakes of the backward op; both are here. How
large the reserve is only cuDNN knows: here it is the gates, the cell states and the outputs of every layer,
direction and time step.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import nn

__all__ = ["REPLACED", "RULES", "SAID", "flattened"]

SAID = "recurrent layers as one cuDNN op each way; the reserve that forward leaves for backward is estimated"
_ATEN: Any = torch.ops.aten
_MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}
_GATES = {0: 1, 1: 1, 2: 4, 3: 4}  # a GRU keeps its new gate with and without the reset


def flattened(model: nn.Module) -> bool:
    """Put the weights of each recurrent layer into one storage, as such a layer does when it moves to a GPU."""
    found = False
    for module in model.modules():
        if not isinstance(module, nn.RNNBase):
            continue
        found = True
        weights = [w for w in module._flat_weights if isinstance(w, torch.Tensor)]
        if len({w.untyped_storage()._cdata for w in weights}) < len(weights):
            continue
        with torch.no_grad():
            flat = weights[0].new_empty(sum(w.numel() for w in weights))
            for weight, part in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
                weight.data = part.view(weight.shape)
    return found


class _CastInto(torch.autograd.Function):
    """A weight in low precision, as its part of the buffer of all weights."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, start: int, weight: torch.Tensor) -> torch.Tensor:
        ctx.dtype = weight.dtype
        # .data: a buffer that is written part by part must not count as changed under the parts before
        return whole.data.narrow(0, start, weight.numel()).view(weight.shape).copy_(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, None, grad.to(ctx.dtype)


def _run(mode: int, x: torch.Tensor, hidden: Any, weights: Any, *settings: Any) -> tuple[torch.Tensor, ...]:
    biases, layers, dropout, train, bidirectional, batch_first = settings
    hx, cx = (hidden[0], hidden[1]) if mode == _MODES["lstm"] else (hidden, None)
    size = (cx if cx is not None else hx).shape[2]
    projected = hx.shape[2] if cx is not None and hx.shape[2] != size else 0
    count = sum(w.numel() for w in weights)
    apart = weights[0].untyped_storage().nbytes() != count * weights[0].element_size()
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, hx, cx = x.to(dtype), hx.to(dtype), None if cx is None else cx.to(dtype)
        whole = torch.empty(count, dtype=dtype, device=x.device)
        starts = accumulate((w.numel() for w in weights), initial=0)
        weights = [_CastInto.apply(whole, start, w) for start, w in zip(starts, weights, strict=False)]
    else:
        with torch.no_grad():
            first = weights[0].detach()
            # in one storage unless weights were tied; those cuDNN copies
            whole = first.new_empty(count) if apart else first.as_strided((count,), (1,), 0)
    per_layer = (4 if biases else 2) + bool(projected)
    out, hy, cy, _, _ = _ATEN._cudnn_rnn(
        x, list(weights), per_layer, whole, hx, cx, mode, size, projected, layers, batch_first, dropout, train,
        bidirectional, [], None,
    )  # fmt: skip
    return (out, hy, cy) if cx is not None else (out, hy)


def _packed(name: str) -> Any:
    def refuse(*args: Any) -> Any:
        raise RuntimeError(
            f"{name} of a packed sequence needs the values of its lengths, and a capture has shapes only: "
            "capture it with padded inputs"
        )

    return refuse


def _layer(name: str) -> Any:
    def run(*args: Any) -> Any:
        if isinstance(
            args[3], bool
        ):  # (input, hidden, weights, biases, layers, dropout, train, both ways, batch first)
            return _run(_MODES[name], *args)
        return _packed(name)()

    return run


REPLACED: dict[Any, Any] = {getattr(torch, name): _layer(name) for name in _MODES}


def _forward(args: tuple[Any, ...]) -> Any:
    out, hy, cy, _, whole = _ATEN._cudnn_rnn.default(*args)
    x, mode, size, layers = args[0], args[6], args[7], args[9]
    steps = prod(x.shape[:2]) * layers * (2 if args[13] else 1)
    kept = _GATES[mode] + (1 if mode == _MODES["lstm"] else 0) + 1
    reserve = x.new_empty(steps * size * kept * x.element_size(), dtype=torch.uint8)
    # the op says that it makes its last result, but it hands back the weights that it was given
    return out, hy, cy, reserve, whole


def _backward(args: tuple[Any, ...]) -> Any:
    x, weights, hx, cx, mask = args[0], args[1], args[4], args[5], args[21]
    whole = weights[0].new_empty(sum(w.numel() for w in weights)) if mask[3] else None
    parts = whole.split([w.numel() for w in weights]) if whole is not None else ()
    return (
        torch.empty_like(x) if mask[0] else None,
        torch.empty_like(hx) if mask[1] else None,
        torch.empty_like(cx) if mask[2] and cx is not None else None,
        [part.view(w.shape) for part, w in zip(parts, weights, strict=True)] if parts else [],
    )


RULES: dict[Any, Any] = {_ATEN._cudnn_rnn.default: _forward, _ATEN._cudnn_rnn_backward.default: _backward}
