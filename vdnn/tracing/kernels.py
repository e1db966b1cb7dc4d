"""The class, sizes, flops and bytes of an op."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch._prims_common import suggest_memory_format
from torch.utils._pytree import tree_leaves

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
# Interpolations with a thread for each pixel of the result, which goes over all planes (ATen's `…_out_frame` kernels).
_PLANE_AFTER_PLANE = ("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d")
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
    if kernel == "conv":
        return _conv(name, args, out)
    if kernel == "matmul":
        return _matmul(name, args)
    if kernel == "attention":
        return _attention(name, args, kwargs)
    if name in ("_cudnn_rnn", "_cudnn_rnn_backward"):
        return _recurrent(name, args)
    given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
    made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
    widest = max((*made[:1], *given), key=torch.Tensor.numel, default=None)
    if widest is None:
        return kernel, (0,), 0
    count = int(widest.numel())
    per = {"norm": 8, "reduce": 4, "pool": 4}.get(kernel, 0 if kernel in ("copy", "embedding") else 1)
    return kernel, (count, *_shape_of_work(name, kernel, args, widest, given, made)), count * per


def _shape_of_work(
    name: str, kernel: Kernel, args: Any, widest: torch.Tensor, given: list[torch.Tensor], made: list[torch.Tensor]
) -> tuple[int, ...]:
    """The sizes after the count of elements, as `Op` names them."""
    if kernel == "norm":
        if "batch_norm" in name or "instance_norm" in name:
            return (int(widest.shape[1]),)
        sizes = next((a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], int)), None)
        return (int(prod(sizes)) if sizes else int(widest.shape[-1]),)
    if kernel == "pool":
        window = next((a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], int)), ())
        pixels = int(prod(window)) if "adaptive" not in name else 0
        return (pixels, *_windows(args, made[0])) if name == "max_pool2d_with_indices" else (pixels,)
    if kernel == "reduce":
        if "softmax" in name:
            dim = next((a for a in args if isinstance(a, int) and not isinstance(a, bool)), -1)
            return int(widest.shape[dim]) if widest.dim() else 1, int(widest.stride()[dim]) if widest.dim() else 1
        smallest = min((*made, *given), key=torch.Tensor.numel)
        dims = next((a for a in args[1:] if isinstance(a, list | tuple) and all(isinstance(i, int) for i in a)), ())
        strides = [widest.stride()[d] for d in dims if widest.shape[d] > 1] if widest.dim() else []
        return max(int(smallest.numel()), 1), int(min(strides, default=1))
    shape = widest.shape
    whole = [t for t in (*given, *made) if t.shape == shape]
    broadcast = sum(1 < t.numel() < widest.numel() for t in given) if kernel == "elementwise" else 0
    if name in _PLANE_AFTER_PLANE and made[0].is_contiguous():
        return _run(whole), broadcast, int(prod(made[0].shape[:2]))
    return _run(whole), broadcast


def _run(tensors: list[torch.Tensor]) -> int:
    """How many elements lie side by side in memory in all of these tensors of one shape, along the last one's order."""
    last = tensors[-1]
    run = 1
    for d in sorted((d for d in range(last.dim()) if last.shape[d] > 1), key=lambda d: last.stride()[d]):
        if any(t.stride()[d] != run for t in tensors):
            break
        run *= int(last.shape[d])
    return run


def _windows(args: Any, out: Any) -> tuple[int, int]:
    """How far a window's last pixel is from its first, and the last window from the first, in elements of a plane."""

    def two(place: int, default: Any) -> tuple[int, int]:
        given = args[place] if len(args) > place and args[place] not in ([], ()) else default
        sizes = [given] if isinstance(given, int) else list(given)
        return sizes[0], sizes[-1]

    size, width = two(1, 1), args[0].shape[-1]
    step, dilation = two(2, size), two(4, 1)
    rows, columns = out.shape[-2:]
    reach = (size[0] - 1) * dilation[0] * width + (size[1] - 1) * dilation[1]
    return int(reach), int((rows - 1) * step[0] * width + (columns - 1) * step[1])


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
    last = (1,) if _channels_last(x) or _channels_last(weight) else ()
    return "conv", (*map(int, dims), *last), int(flops)


def _channels_last(tensor: torch.Tensor) -> bool:
    """Whether PyTorch gives it to cuDNN as NHWC: so it does with the permuted result of a linear layer."""
    return tensor.dim() in (4, 5) and suggest_memory_format(tensor) is not torch.contiguous_format


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
