"""The class, sizes, flops and bytes of an op."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from vdnn.values import Kernel

__all__ = ["describe", "touched_bytes"]

_CLASSES: tuple[tuple[Kernel, tuple[str, ...]], ...] = (
    ("conv", ("convolution", "conv2d", "cudnn_convolution")),
    ("attention", ("_scaled_dot_product", "_flash_attention", "_efficient_attention")),
    ("matmul", ("mm", "bmm", "addmm", "baddbmm", "linear", "addbmm", "addmv", "mv", "dot", "_grouped_mm")),
    ("norm", ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")),
    ("pool", ("pool",)),
    ("embedding", ("embedding",)),
    ("rnn", ("rnn", "lstm", "gru")),
    ("copy", ("copy", "clone", "cat", "stack", "_to_copy", "index", "gather", "scatter", "roll", "constant_pad")),
    ("reduce", ("sum", "mean", "amax", "amin", "softmax", "nll_loss", "var", "norm", "max", "min", "cumsum")),
)
_NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "device",
    "detach",
    "lift_fresh",
}


def touched_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements that the view really has: an expanded dimension is one."""
    sizes = [1 if s == 0 else n for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    return prod(sizes) * tensor.element_size()


def _class(name: str) -> Kernel:
    for kernel, parts in _CLASSES:
        if kernel == "matmul":
            if name in parts:
                return kernel
        elif any(part in name for part in parts):
            return kernel
    return "elementwise"


def describe(func: Any, args: Any, kwargs: Any, out: Any, aliases: bool) -> tuple[Kernel, tuple[int, ...], int]:
    """(kernel class, dims, flops) of one aten op."""
    name = func._schema.name.split("::")[-1].rstrip("_")
    if name in _NO_KERNEL or (aliases and not func._schema.is_mutable):
        return "view", (), 0
    if name.startswith("grouped_mm_fallback"):
        return _grouped_rows(name, args, out)
    kernel = _class(name)
    first = out[0] if isinstance(out, tuple | list) and out else out
    if kernel == "conv":
        return _conv(name, args, out)
    if kernel == "matmul":
        return _matmul(name, args)
    if kernel == "attention":
        return _attention(name, args, kwargs)
    if name in ("_cudnn_rnn", "_cudnn_rnn_backward"):
        return _recurrent(name, args)
    count = first.numel() if isinstance(first, torch.Tensor) else 0
    for item in args:
        if isinstance(item, torch.Tensor):
            count = max(count, item.numel())
    per = {"norm": 8, "reduce": 4, "pool": 4}.get(kernel, 0 if kernel in ("copy", "embedding") else 1)
    return kernel, (count,), count * per


def _recurrent(name: str, args: Any) -> tuple[Kernel, tuple[int, ...], int]:
    """Every weight matrix is applied once to each time step of each sequence; dims: steps × sequences, weights."""
    x, weights, per_layer = args[0], args[1], args[2]
    tokens = x.numel() // x.shape[-1]
    matrices = sum(w.numel() for w in weights if w.dim() > 1)
    flops = 2 * tokens * matrices
    if name.endswith("backward"):
        bidirectional, mask = args[17], args[21]
        of_input = sum(weights[i * per_layer].numel() for i in range(2 if bidirectional else 1))
        flops = flops - (0 if mask[0] else 2 * tokens * of_input) + (flops if mask[3] else 0)
    return "rnn", (tokens, matrices), flops


def _conv(name: str, args: Any, out: Any) -> tuple[Kernel, tuple[int, ...], int]:
    backward = "backward" in name
    if backward:
        grad, x, weight = args[0], args[1], args[2]
        transposed, groups, mask = args[7], args[9], args[10]
        work = int(mask[0]) + int(mask[1])
        y = grad
    else:
        x, weight = args[0], args[1]
        transposed = bool(args[6]) if len(args) > 6 else False
        groups = args[8] if len(args) > 8 else 1
        work, y = 1, out
    kernel_pixels = prod(weight.shape[2:])
    c_in, c_out = x.shape[1], y.shape[1]
    # every output (for a transposed one: input) element is a sum over the channels of its group
    elements = x.numel() if transposed else y.numel()
    channels = (c_out if transposed else c_in) // groups
    flops = 2 * elements * channels * kernel_pixels * work
    dims = (x.shape[0], c_in, c_out, groups, prod(y.shape[2:]), kernel_pixels, prod(x.shape[2:]))
    return "conv", tuple(map(int, dims)), int(flops)


def _matmul(name: str, args: Any) -> tuple[Kernel, tuple[int, ...], int]:
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if name in ("addmm", "baddbmm", "addmv", "addbmm"):
        tensors = tensors[1:]
    a, b = tensors[0], tensors[1]
    if name == "dot":
        return "matmul", (1, 1, 1, int(a.numel())), 2 * int(a.numel())
    if a.dim() == 3 and b.dim() == 3:
        batch, m, k = a.shape
        n = b.shape[2]
    else:
        k = a.shape[-1]
        m, batch = a.numel() // max(k, 1), 1
        n = b.shape[0] if name == "linear" else (b.shape[-1] if b.dim() > 1 else 1)
    return "matmul", (int(batch), int(m), int(n), int(k)), 2 * int(batch * m * n * k)


def _grouped_rows(name: str, args: Any, out: Any) -> tuple[Kernel, tuple[int, ...], int]:
    """Rows times the matrix of their expert: each row meets one matrix of (in, out)."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    weight = next(t for t in tensors if t.dim() == 3)
    rows = next(t for t in tensors if t.dim() == 2).shape[0]
    flops = 2 * int(rows * weight.shape[1] * weight.shape[2]) * (2 if "backward" in name else 1)
    return "matmul", (1, int(rows), int(weight.shape[2]), int(weight.shape[1])), flops


def _attention(name: str, args: Any, kwargs: Any) -> tuple[Kernel, tuple[int, ...], int]:
    backward = "backward" in name
    q, k = (args[1], args[2]) if backward else (args[0], args[1])
    batch, heads, queries, size = q.shape
    keys = k.shape[2]
    causal = any(a is True for a in args) or bool(kwargs.get("is_causal"))
    # two products forward; backward computes the scores again and four more
    products = 5 if backward else 2
    flops = 2 * products * batch * heads * queries * keys * size
    return "attention", tuple(map(int, (batch, heads, queries, keys, size))), int(flops // 2 if causal else flops)
