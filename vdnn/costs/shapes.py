"""What an op's time depends on, as plain rows: the same shapes are priced once, however many ops have them.

A trace of ten thousand ops has some hundred shapes. `shapes_of` sorts them into families, each of which has one formula
(vdnn.costs.kernel_times):

product      matrix products                               batch, m, n, k
convolution  dense, grouped, depthwise; forward, data and weight gradients
attention    fused attention                               batch × heads, queries, keys, head size
stream       everything that is bound by memory: a kind, its bytes, and how they lie
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from vdnn.values.trace import Op, Trace

__all__ = ["AttentionShape", "ConvShape", "ProductShape", "Shapes", "StreamShape", "shapes_of"]

ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "bool": 1, "uint8": 1}


class ProductShape(NamedTuple):
    """A matrix product, (m, k) · (k, n), `batch` times; `kernel` is "matmul", "rnn" or "other"."""

    kernel: str
    dtype: str
    batch: int
    m: int
    n: int
    k: int
    nbytes: int


class ConvShape(NamedTuple):
    """A convolution or one of its gradients (`way`: "forward", "data", "weight"). Pixels are of the whole image.

    `biased`: a bias is added, or its gradient summed, in a kernel of its own. `nhwc`: tensors have channels last.
    """

    dtype: str
    way: str
    batch: int
    c_in: int
    c_out: int
    groups: int
    out_pixels: int
    window: int
    in_pixels: int
    biased: bool
    nhwc: bool


class AttentionShape(NamedTuple):
    """Fused attention: `products` is how many (queries, keys, size) products it takes."""

    dtype: str
    backward: bool
    batch: int
    queries: int
    keys: int
    size: int
    flops: int
    nbytes: int


class StreamShape(NamedTuple):
    """An op that memory bounds. `run_bytes` lie side by side in all its tensors; `broadcast`: some are broadcast.

    `kind` tells which fraction of the bandwidth it reaches: that of `CostNumbers` with this name, or that of streams.
    `row_bytes`: of a row that is normalised; 0 for other kinds. `planes`: of images, that a thread for each of their
    `pixels` goes over one by one.
    """

    kernel: str
    kind: str
    read_bytes: int
    written_bytes: int
    run_bytes: int
    broadcast: bool
    row_bytes: int
    planes: int = 0
    pixels: int = 0


@dataclass(slots=True)
class Shapes:
    """Distinct shapes by family, and for each op which of them it is made of.

    `parts` holds (op, family, number): an op may be several kernels, such as both gradients of a convolution.
    """

    products: dict[ProductShape, int] = field(default_factory=dict)
    convolutions: dict[ConvShape, int] = field(default_factory=dict)
    attentions: dict[AttentionShape, int] = field(default_factory=dict)
    streams: dict[StreamShape, int] = field(default_factory=dict)


Part = tuple[int, int]  # family (in the order of `Shapes`), number
PRODUCT, CONVOLUTION, ATTENTION, STREAM = range(4)


def shapes_of(trace: Trace, shapes: Shapes) -> list[tuple[Part, ...]]:
    """For each op the shapes it is made of, which are added to `shapes`; () for an op that runs no kernel."""
    nhwc = trace.channels_last
    known: dict[tuple[object, ...], tuple[Part, ...]] = {}
    found = []
    for op in trace.ops:
        key = (op.name, op.kernel, op.dtype, op.dims, op.phase, op.flops, op.read_bytes, op.written_bytes)
        parts = known.get(key)
        if parts is None:
            parts = known[key] = tuple(_parts(op, nhwc, shapes))
        found.append(parts)
    return found


def _parts(op: Op, nhwc: bool, shapes: Shapes) -> Iterable[Part]:
    if op.kernel == "view":
        return
    if op.kernel == "conv" and len(op.dims) >= 7:
        for conv in _convolutions(op, nhwc or len(op.dims) > 7):
            yield CONVOLUTION, shapes.convolutions.setdefault(conv, len(shapes.convolutions))
        return
    if op.kernel == "attention" and len(op.dims) == 5:
        batch, heads, queries, keys, size = op.dims
        backward = "backward" in op.name
        attention = AttentionShape(
            op.dtype, backward, batch * heads, queries, keys, size, op.flops, op.read_bytes + op.written_bytes
        )
        yield ATTENTION, shapes.attentions.setdefault(attention, len(shapes.attentions))
        return
    if op.kernel in ("matmul", "attention", "conv", "rnn") or (op.kernel == "other" and op.flops):
        dims = op.dims if op.kernel == "matmul" and len(op.dims) == 4 else _cube(op.flops)
        product = ProductShape(op.kernel, op.dtype, *dims, op.read_bytes + op.written_bytes)
        yield PRODUCT, shapes.products.setdefault(product, len(shapes.products))
        return
    stream = _stream(op)
    yield STREAM, shapes.streams.setdefault(stream, len(shapes.streams))


def _cube(flops: int) -> tuple[int, int, int, int]:
    """A product of as many flops whose shape is not known: large enough to be no special case."""
    side = 512
    return max(1, round(flops / (2 * side**3))), side, side, side if flops else 1


def _convolutions(op: Op, nhwc: bool) -> Iterable[ConvShape]:
    batch, c_in, c_out, groups, out_pixels, window, in_pixels = op.dims[:7]
    item = ITEM_BYTES.get(op.dtype, 4)
    x = batch * c_in * in_pixels * item
    # of a transposed convolution the weights are the same number, c_in · c_out / groups
    weights = c_in * c_out // max(groups, 1) * window * item
    if "backward" not in op.name:
        biased = op.read_bytes > x + weights
        yield ConvShape(op.dtype, "forward", batch, c_in, c_out, groups, out_pixels, window, in_pixels, biased, nhwc)
        return
    data = op.written_bytes >= x + weights // 2 and x > 0
    weight = not data or op.written_bytes >= x + weights
    biased = op.written_bytes > (x if data else 0) + (weights if weight else 0)
    sizes = (batch, c_in, c_out, groups, out_pixels, window, in_pixels)
    if data:
        yield ConvShape(op.dtype, "data", *sizes, biased and not weight, nhwc)
    if weight:
        yield ConvShape(op.dtype, "weight", *sizes, biased, nhwc)


def _stream(op: Op) -> StreamShape:
    item = ITEM_BYTES.get(op.dtype, 4)
    dims = (*op.dims, 0, 0, 0)
    kind = kind_of(op)
    run, broadcast, row, planes = 1 << 30, False, 0, 0
    if kind == "elementwise" and len(op.dims) >= 3:
        planes = op.dims[3] if len(op.dims) > 3 else 0
        broadcast = dims[2] > 0
        run = dims[1] * item if dims[1] < dims[0] else 1 << 30  # all in one piece
    elif kind in ("softmax", "layer_norm", "layer_norm_backward"):
        row = dims[1] * item
    return StreamShape(
        op.kernel,
        kind,
        op.read_bytes,
        op.written_bytes,
        run,
        broadcast,
        row,
        planes,
        op.dims[0] // planes if planes else 0,
    )


def kind_of(op: Op) -> str:
    """Which kind of stream an op is, by its class and name."""
    name = op.name
    backward = "backward" in name
    if op.kernel == "norm":
        if "batch_norm" not in name and "instance_norm" not in name:
            return "layer_norm_backward" if backward else "layer_norm"
        if backward:
            return "batch_norm_backward"
        # in evaluation it keeps no statistics, and is one pass like any other
        keeps = op.written_bytes > op.dims[0] * ITEM_BYTES.get(op.dtype, 4) if op.dims else True
        return "batch_norm" if keeps else "elementwise"
    if op.kernel == "pool":
        return "pool_backward" if backward else "pool"
    if op.kernel == "reduce":
        return "softmax" if "softmax" in name else "reduce"
    if op.kernel == "embedding":
        return "scatter" if backward else "gather"
    if "index_put" in name or "scatter" in name or "index_add" in name:
        return "scatter"
    if "index" in name or "gather" in name:
        return "gather"
    return "elementwise"
