"""The kernels that are measured on a CPU one by one: ops of training steps at several sizes, none for any model.

Streams (elementwise, copies, norms, reductions) at four sizes from one element to more than a cache holds. Products
on a grid of their three sizes. Convolutions on a grid of kernel, channels and pixels: dense, depthwise, grouped,
strided, and those that read pixels of an image. Attention at three lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from vdnn.tracing.kernels import describe, touched_bytes

__all__ = ["Case", "cases", "parts"]

_ATEN: Any = torch.ops.aten
COLUMNS = 512  # of the matrices that streams run on
ROWS = (1, 128, 2048, 14_336)  # 1 KiB, 256 KiB, 4 MiB, 28 MiB: less than what malloc maps anew each time
SPREAD = (1, 128, 2048)


@dataclass(frozen=True, slots=True)
class Case:
    """One op with arguments: its sizes as a trace has them."""

    op: str
    sizes: tuple[int, ...]
    call: Callable[[], Any]


def parts(dtype: torch.dtype) -> dict[str, Iterator[Case]]:
    """The kernels to measure, by what they are; arguments are made when one is asked for, and go with it."""
    return {
        "elementwise ops, copies, sums and norms": _streams(dtype),
        "norms and pooling of images": _images(dtype),
        "products of matrices": _products(dtype),
        "convolutions": _convolutions(dtype),
        "attention": _attention(dtype),
    }


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """Every kernel of every part."""
    for part in parts(dtype).values():
        yield from part


def _case(func: Any, *args: Any, **kwargs: Any) -> Case:
    """The op, with the sizes that a capture writes down for it: dims of products and the like, else bytes."""
    out = func(*args, **kwargs)
    kernel, dims, _ = describe(func, args, kwargs, out, False)
    tensors = [t for t in (*tree_leaves((args, kwargs)), *tree_leaves(out)) if isinstance(t, torch.Tensor)]
    sizes = dims if kernel in ("conv", "matmul", "attention") else (sum(map(touched_bytes, tensors)),)
    if kernel == "attention":
        sizes = (*dims, int(any(a is True for a in args)))
    return Case(func._schema.name.split("::")[-1], sizes, lambda: func(*args, **kwargs))


def _streams(dtype: torch.dtype) -> Iterator[Case]:
    scalar = torch.tensor(0.7, dtype=dtype)
    for rows in ROWS:
        x, y = torch.rand(rows, COLUMNS, dtype=dtype), torch.rand(rows, COLUMNS, dtype=dtype)
        if rows == 1:
            yield Case("view", (0,), lambda x=x: x.view(-1))  # type: ignore[misc]
            yield Case("module", (0,), _module_call())
        for func in (_ATEN.add.Tensor, _ATEN.mul.Tensor, _ATEN.sub.Tensor, _ATEN.div.Tensor):
            yield _case(func, x, y)
        for func in (_ATEN.add_.Tensor, _ATEN.mul_.Tensor, _ATEN.copy_.default):
            yield _case(func, x.clone(), y)
        yield _case(_ATEN.div_.Tensor, x.clone(), scalar)
        yield _case(_ATEN.fill_.Tensor, x.clone(), scalar)
        for func in (_ATEN.relu_.default, _ATEN.hardswish_.default, _ATEN.silu_.default, _ATEN.zero_.default):
            yield _case(func, x.clone())
        for name in ("relu", "gelu", "tanh", "sigmoid", "silu", "hardswish", "hardsigmoid", "exp", "rsqrt", "sqrt",
                     "neg", "cos", "clone"):  # fmt: skip
            yield _case(getattr(_ATEN, name).default, x)
        yield _case(_ATEN.pow.Tensor_Scalar, x, 3.0)
        yield _case(_ATEN.threshold_backward.default, x, y, 0)
        for name in ("gelu_backward", "tanh_backward", "sigmoid_backward", "silu_backward", "hardswish_backward",
                     "hardsigmoid_backward"):  # fmt: skip
            yield _case(getattr(_ATEN, name).default, x, y)
        if rows in SPREAD or rows == ROWS[-1]:
            yield _case(_ATEN.bernoulli_.float, x.clone(), 0.9)
            yield _case(_ATEN.native_dropout.default, x, 0.1, True)
            yield _case(_ATEN._softmax.default, x, -1, False)
            yield _case(_ATEN._softmax_backward_data.default, x, y, -1, dtype)
            yield _case(_ATEN._log_softmax.default, x, -1, False)
            yield _case(_ATEN._log_softmax_backward_data.default, x, y, -1, dtype)
            yield _case(_ATEN.sum.dim_IntList, x, [0], True)
            yield _case(_ATEN.mean.dim, x, [-1], True)
            yield _case(_ATEN.cat.default, [x, y], 1)
            yield _case(_ATEN.constant_pad_nd.default, x, [1, 1], 0)
            yield _case(_ATEN.roll.default, x, [1], [1])
            yield _case(_ATEN.where.self, x > 0.5, x, y)
            yield _case(_ATEN.masked_fill.Scalar, x, x > 0.5, 0.0)
            yield _case(_ATEN.slice_backward.default, x, [rows, COLUMNS + 8], 1, 0, COLUMNS, 1)
            weight = torch.rand(COLUMNS, dtype=dtype)
            yield _case(_ATEN.native_layer_norm.default, x, [COLUMNS], weight, weight, 1e-5)
            _, mean, deviation = _ATEN.native_layer_norm(x, [COLUMNS], weight, weight, 1e-5)
            given = (y, x, [COLUMNS], mean, deviation, weight, weight, [True] * 3)
            yield _case(_ATEN.native_layer_norm_backward.default, *given)
            ids = torch.randint(0, 1000, (rows,))
            table = torch.rand(1000, COLUMNS, dtype=dtype)
            yield _case(_ATEN.embedding.default, table, ids)
            yield _case(_ATEN.embedding_dense_backward.default, x, ids, 1000, -1, False)
            yield _case(_ATEN.index.Tensor, table, [ids])


def _module_call() -> Callable[[], Any]:
    module = torch.nn.Identity()
    x = torch.zeros(1)
    return lambda: module(x)


def _images(dtype: torch.dtype) -> Iterator[Case]:
    """Ops on images: norms, pooling, and what turns dimensions around."""
    for batch, channels, pixels in ((1, 16, 8), (1, 64, 32), (8, 64, 56), (8, 256, 56), (16, 512, 14)):
        x = torch.rand(batch, channels, pixels, pixels, dtype=dtype)
        w = torch.rand(channels, dtype=dtype)
        yield _case(_ATEN.native_batch_norm.default, x, w, w, w.clone(), w.clone(), True, 0.1, 1e-5)
        _, mean, deviation = _ATEN.native_batch_norm(x, w, w, w.clone(), w.clone(), True, 0.1, 1e-5)
        given = (x.clone(), x, w, w, w, mean, deviation, True, 1e-5, [True] * 3)
        yield _case(_ATEN.native_batch_norm_backward.default, *given)
        window = ([3, 3], [2, 2], [1, 1])
        yield _case(_ATEN.max_pool2d_with_indices.default, x, *window)
        pooled, where = _ATEN.max_pool2d_with_indices(x, *window)
        yield _case(
            _ATEN.max_pool2d_with_indices_backward.default, pooled, x, *window, [1, 1], False, where
        )  # fmt: skip
        yield _case(_ATEN.avg_pool2d.default, x, [2, 2], [2, 2])
        yield _case(_ATEN.avg_pool2d_backward.default, _ATEN.avg_pool2d(x, [2, 2], [2, 2]), x, [2, 2], [2, 2], [0, 0],
                    False, True, None)  # fmt: skip
        yield _case(_ATEN.native_group_norm.default, x, w, w, batch, channels, pixels**2, 8, 1e-5)
        turned = x.permute(0, 2, 3, 1)
        yield _renamed("clone turned", _case(_ATEN.clone.default, turned, memory_format=torch.contiguous_format))
        yield _renamed("mul broadcast", _case(_ATEN.mul.Tensor, x, x[:, :, :1, :1].contiguous()))
        yield _renamed("add turned", _case(_ATEN.add.Tensor, turned, turned.contiguous()))


def _renamed(name: str, case: Case) -> Case:
    return Case(name, case.sizes, case.call)


def _products(dtype: torch.dtype) -> Iterator[Case]:
    for m, n, k in product((16, 128, 1024), repeat=3):
        yield _case(_ATEN.mm.default, torch.rand(m, k, dtype=dtype), torch.rand(n, k, dtype=dtype).t())
    for batch, (m, n, k) in product(
        (8, 96), ((49, 49, 32), (49, 32, 49), (64, 64, 64), (256, 256, 64), (256, 64, 256))
    ):
        yield _case(_ATEN.bmm.default, torch.rand(batch, m, k, dtype=dtype), torch.rand(batch, k, n, dtype=dtype))


def _convolutions(dtype: torch.dtype) -> Iterator[Case]:
    """(channels in and out, groups, pixels a side, kernel, stride): as many images as make 0.8 Gflop, 8 at most."""
    shapes = [
        (channels, channels, 1, pixels, kernel, 1)
        for kernel, channels, pixels in product((1, 3), (32, 128, 512), (7, 14, 28, 56))
        if channels * pixels <= 128 * 56
    ]
    shapes += [
        (channels, channels, channels, pixels, kernel, stride)
        for kernel, channels, pixels, stride in product((3, 5, 7), (32, 256), (7, 14, 56), (1, 2))
        if (kernel, stride) != (7, 2)
    ]
    shapes += [(c, c, 32, p, 3, s) for c, p, s in product((128, 512), (14, 28), (1, 2))]
    shapes += [(64, 128, 1, 56, 1, 2), (256, 512, 1, 28, 1, 2), (64, 128, 1, 56, 3, 2), (256, 512, 1, 14, 3, 2)]
    shapes += [(64, 256, 1, 28, 1, 1), (256, 64, 1, 28, 1, 1), (24, 144, 1, 28, 1, 1), (144, 24, 1, 28, 1, 1)]
    shapes += [(3, 32, 1, 112, 3, 2), (3, 64, 1, 224, 7, 2), (3, 64, 1, 224, 3, 1), (3, 96, 1, 224, 4, 4)]
    shapes += [(3, 384, 1, 224, 16, 16)]
    # from 16 images on torch has another kernel for one pixel and one thread
    batches = [(shape, 0) for shape in shapes] + [((c, c, 1, p, 1, 1), 16) for c, p in ((32, 28), (128, 14), (512, 7))]
    for (c_in, c_out, groups, pixels, kernel, stride), images in batches:
        after = pixels // stride
        flops = 2 * c_in // groups * c_out * after * after * kernel * kernel
        batch = images or max(1, min(8, 800_000_000 // flops))
        x = torch.rand(batch, c_in, pixels, pixels, dtype=dtype)
        w = torch.rand(c_out, c_in // groups, kernel, kernel, dtype=dtype)
        pad = 0 if kernel == stride else kernel // 2
        given = ([stride] * 2, [pad] * 2, [1, 1], False, [0, 0], groups)
        yield _case(_ATEN.convolution.default, x, w, None, *given)
        y = _ATEN.convolution(x, w, None, *given)
        mask = [c_in > 3, True, False]  # images need no gradient
        yield _case(_ATEN.convolution_backward.default, y, x, w, None, *given, mask)


def _attention(dtype: torch.dtype) -> Iterator[Case]:
    for batch, length, causal in product((1, 4), (64, 256), (False, True)):
        q, k, v = (torch.rand(batch, 12, length, 64, dtype=dtype) for _ in range(3))
        func = _ATEN._scaled_dot_product_flash_attention_for_cpu
        yield _case(func.default, q, k, v, 0.0, causal)
        out, sums = func(q, k, v, 0.0, causal)
        back = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default
        yield _case(back, out, q, k, v, out, sums, 0.0, causal)
