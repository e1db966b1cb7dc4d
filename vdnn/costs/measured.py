"""The time of an op on a machine whose kernels were measured one by one (`Hardware.timings`): between its neighbours.

    streams (all that moves memory)     piecewise linear in bytes between the sizes of the same op
    products, convolutions, attention   the mean of the neighbours' rates, weighted by nearness in the logarithms of
                                        their sizes, plus what the smallest op takes
    lists of tensors (foreach)          one op after the other
    a view, a module's call             what one took, whatever its size

An op that was not measured takes the time of one of its class that was. New memory costs its page faults: malloc maps
blocks above 32 MiB anew each time and hands smaller ones on. Such a machine issues and computes in one thread, so that
its ops' times add up.
"""

from __future__ import annotations

from bisect import bisect_left
from math import exp, log, log2

from vdnn.values.hardware import Hardware
from vdnn.values.trace import Kernel, Op, Trace

__all__ = ["measured_times"]

_PAGE = 4096
_LIKE: dict[Kernel, str] = {  # the op that stands for a class
    "conv": "convolution",
    "matmul": "mm",
    "attention": "_scaled_dot_product_flash_attention_for_cpu",
    "norm": "native_layer_norm",
    "pool": "avg_pool2d",
    "elementwise": "add",
    "reduce": "sum",
    "copy": "clone",
    "embedding": "embedding",
    "rnn": "mm",
    "view": "view",
    "other": "add",
}
_SAME = {"addmm": "mm", "linear": "mm", "baddbmm": "bmm", "_safe_softmax": "_softmax"}
_FREE = ("detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh")
_SMALL = "add"  # its least size says what any op takes to start

Sizes = tuple[int, ...]


def measured_times(trace: Trace, hardware: Hardware) -> list[int]:
    """Nanoseconds of each op, with the module calls that begin before it."""
    table = _Table(hardware)
    times = [table.ns(op) for op in trace.ops]
    if hardware.fresh_from_bytes:
        for storage in trace.storages:
            if storage.alloc >= 0 and storage.nbytes >= hardware.fresh_from_bytes and trace.ops:
                at = min(storage.alloc, len(times) - 1)
                times[at] += -(-storage.nbytes // _PAGE) * hardware.page_ns
    for call in trace.modules:
        if call.forward_begin < len(times):
            times[call.forward_begin] += table.module
    return times


class _Table:
    def __init__(self, hardware: Hardware) -> None:
        self.rows: dict[str, list[tuple[Sizes, int]]] = {}
        for t in sorted(hardware.timings, key=lambda t: t.sizes):
            self.rows.setdefault(t.op, []).append((t.sizes, t.ns))
        self.start = self.rows[_SMALL][0][1] if _SMALL in self.rows else 0
        self.module = self.rows["module"][0][1] if "module" in self.rows else 0
        self._seen: dict[tuple[str, Sizes], int] = {}

    def ns(self, op: Op) -> int:
        name = op.name.split(".")[1] if op.name.startswith("aten.") else op.name
        if name.startswith("_foreach_"):
            return self._list(name, op)
        if name in _FREE:
            return 0
        name = _SAME.get(name, name)
        if op.kernel == "view":
            return self._stream("view", 0)
        name = self._turned(name, op)
        if name not in self.rows:
            name = name.rstrip("_") if name.rstrip("_") in self.rows else _LIKE[op.kernel]
        if op.kernel in ("conv", "matmul", "attention"):
            full = _work(op.kernel, op.dims)
            dims = (*op.dims, int(op.flops < full)) if op.kernel == "attention" else op.dims
            key = (name, dims)
            if key not in self._seen:
                self._seen[key] = self._product(name, op.kernel, dims)
            return self._seen[key]
        return self._stream(name, op.read_bytes + op.written_bytes)

    def _turned(self, name: str, op: Op) -> str:
        """Copies and sums of tensors whose dimensions are in another order, or of one that is spread over the other."""
        if len(op.dims) < 3 or op.kernel not in ("elementwise", "copy"):
            return name
        elements, run, broadcast = op.dims[:3]
        if op.kernel == "copy" and name in ("clone", "copy_", "_to_copy") and run < min(elements, 64):
            return "clone turned"
        if op.kernel == "elementwise" and broadcast:
            return "mul broadcast"
        if op.kernel == "elementwise" and run < min(elements, 64) and name in ("add", "mul", "sub", "add_", "mul_"):
            return "add turned"
        return name

    def _list(self, name: str, op: Op) -> int:
        single = name.removeprefix("_foreach_")
        if single not in self.rows:
            single = "add_"
        count = max(len(op.writes), 1)
        return count * self._stream(single, (op.read_bytes + op.written_bytes) // count)

    def _stream(self, name: str, nbytes: int) -> int:
        rows = self.rows.get(name)
        if not rows:
            return self.start
        at = bisect_left(rows, nbytes, key=lambda row: row[0][0])
        if at == 0:
            return rows[0][1]
        (low,), low_ns = rows[at - 1]
        if at == len(rows):
            return max(1, round(low_ns * nbytes / max(low, 1)))
        (high,), high_ns = rows[at]
        return max(1, round(low_ns + (high_ns - low_ns) * (nbytes - low) / max(high - low, 1)))

    def _product(self, name: str, kernel: Kernel, dims: Sizes) -> int:
        rows = self.rows.get(name)
        if not rows:
            return self.start
        here = _features(kernel, dims)
        total = mean = 0.0
        for sizes, ns in rows:
            there = _features(kernel, sizes)
            distance = sum((a - b) ** 2 for a, b in zip(here, there, strict=True))
            weight = (distance + 0.01) ** -2
            total += weight
            mean += weight * log(_work(kernel, sizes) / max(ns - self.start, 1))
        return max(1, round(self.start + _work(kernel, dims) / exp(mean / total)))


def _work(kernel: Kernel, dims: Sizes) -> int:
    """Flops of the product, forward: a measure of size alone for what runs backward."""
    if kernel == "conv":
        batch, c_in, c_out, groups, pixels, window, before = dims[:7]
        return max(1, 2 * batch * c_in // groups * c_out * max(min(pixels, before), 1) * window)
    if kernel == "attention":
        batch, heads, queries, keys, size = dims[:5]
        return max(1, 4 * batch * heads * queries * keys * size)
    if len(dims) == 4:
        batch, m, n, k = dims
        return max(1, 2 * batch * m * n * k)
    return max(1, 2 * dims[0] * dims[-1])  # recurrent layers: tokens × weights


def _features(kernel: Kernel, dims: Sizes) -> tuple[float, ...]:
    """Where a product stands among others: what decides its rate counts once, what hardly does a part."""

    def at(n: float) -> float:
        return log2(max(n, 1))

    if kernel == "conv":
        batch, c_in, c_out, groups, pixels, window, before = dims[:7]
        return (
            at(c_in // groups),
            at(c_out // groups),
            at(min(groups, 32)),
            at(groups) / 4,
            at(pixels) / 2,
            at(batch * pixels) / 2,
            at(window),
            at(before / max(pixels, 1)),
            3.0 * (window == 1 and batch >= 16),
        )
    if kernel == "attention":
        batch, heads, queries, keys, size, causal = dims
        return at(batch * heads) / 4, at(queries), at(keys), at(size), 4.0 * causal
    if len(dims) == 4:
        batch, m, n, k = dims
        return at(batch) / 4, at(m), at(n), at(k)
    return 0.0, at(dims[0]), at(dims[-1]) / 2, at(dims[-1]) / 2
