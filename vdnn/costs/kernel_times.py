"""Nanoseconds of each shape on a machine: one formula a family, from `CostNumbers` and the machine's datasheet.

product       waves of tiles over the multiprocessors, each tile at a fraction of its multiprocessor's peak
convolution   the same of its implicit product, or Winograd's products, or (depthwise) its traffic and its arithmetic;
              around tensor cores NCHW tensors are turned to NHWC and back
attention     its products, at fractions of their own
stream        bytes over a fraction of the bandwidth

Every kernel adds its start. Nothing here knows a model, and a machine is known by its `Hardware` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vdnn.costs.numbers import CostNumbers
from vdnn.costs.shapes import AttentionShape, ConvShape, ProductShape, Shapes, StreamShape
from vdnn.values.hardware import Hardware

__all__ = [
    "FAMILIES",
    "Columns",
    "Machine",
    "attention_ns",
    "convolution_ns",
    "family_times",
    "product_ns",
    "stream_ns",
]

F = npt.NDArray[np.float64]
# Tiles that library kernels are built for: rows × columns of the result. Each product takes the one that is fastest.
TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (64, 32), (32, 64))
LOW = ("float16", "bfloat16")
THREADS_OF_A_MULTIPROCESSOR = 1536
BLOCKS_OF_A_MULTIPROCESSOR = 6  # these threads in blocks of 256
SPLIT_WAVES = 4  # of weights' gradients in fp32, which no row is about: so that the last parts leave few idle
CHANNELS_OF_TENSOR_CORES = 8  # fp16 kernels read 16 bytes at once


@dataclass(frozen=True, slots=True)
class Machine:
    """What the formulas need of a `Hardware`: rates in 1/ns, sizes in bytes. A number not known has no effect."""

    hardware: Hardware
    dram: float
    multiprocessors: float
    start_ns: float
    cores: float  # flops a ns of the cores for fp32, as far as the power allows

    @staticmethod
    def of(hardware: Hardware, numbers: CostNumbers, lasting: bool = True) -> Machine:
        """Of work that lasts: a board's limit of power lowers its clock only after some milliseconds."""
        peak = hardware.peak("float32") / 1e9
        if lasting and hardware.power_watts is not None and hardware.process_nm is not None:
            energy = numbers.fp32_pj_per_flop * (hardware.process_nm / 12) ** 2  # areas, and so capacities
            peak = min(peak, hardware.power_watts / energy * 1e3)
        return Machine(
            hardware,
            hardware.dram_bytes_per_s / 1e9,
            float(hardware.sm_count or 1),
            hardware.kernel_ns * numbers.kernel_start,
            peak,
        )

    def matrix_rate(self, dtype: str, conv: bool) -> tuple[float, bool]:
        """(flops a ns, whether tensor cores do it) of a product of this dtype, as PyTorch's defaults have it."""
        asked = "tf32" if conv and dtype == "float32" and any(p.dtype == "tf32" for p in self.hardware.peaks) else dtype
        peak = self.hardware.peak(asked) / 1e9
        tensor = peak > 1.5 * self.hardware.peak("float32") / 1e9 and asked != "float32"
        return (peak, True) if tensor else (min(self.cores * (peak * 1e9 / self.hardware.peak("float32")), peak), False)

    @property
    def batched_rows(self) -> int:
        """The fewest rows of a tile in products of many matrices on the cores: from Ampere on no kernel has fewer."""
        return 128 if any(p.dtype == "bfloat16" for p in self.hardware.peaks) else 64

    @property
    def before_volta(self) -> bool:
        """By the process: Pascal's chips have 16 nm, Maxwell's 28."""
        return self.hardware.process_nm is not None and self.hardware.process_nm >= 16

    def measured(self, kernel: str, compute: float, memory: float) -> tuple[float, float]:
        """Fractions of peak and bandwidth of a class of kernels: as measured on this machine, else as given."""
        for e in self.hardware.efficiencies:
            if e.kernel == kernel:
                return e.compute_permille / 1000, e.memory_permille / 1000
        return compute, memory


class Columns(list[Any]):
    """Shapes whose fields are turned to arrays once, for who prices them many times."""

    def __init__(self, shapes: Iterable[Any]) -> None:
        super().__init__(shapes)
        self.arrays = [np.array(column) for column in zip(*self, strict=True)]


def _columns(shapes: Sequence[Any]) -> list[npt.NDArray[Any]]:
    return (shapes if isinstance(shapes, Columns) else Columns(shapes)).arrays


def _floats(columns: Iterable[npt.NDArray[Any]]) -> list[F]:
    return [column.astype(np.float64) for column in columns]


def _sizes(columns: Iterable[npt.NDArray[Any]]) -> list[F]:
    """Sizes that something is divided by: an op on nothing is priced as one on a single element."""
    return [np.maximum(column, 1) for column in _floats(columns)]


# -- products ------------------------------------------------------------------------------------


def tiled_ns(
    batch: F,
    m: F,
    n: F,
    k: F,
    rate: F | float,
    fraction: F | float,
    half: float,
    start_k: F | float,
    sms: float,
    rows: int = 32,
    columns: int = 32,
    split: npt.NDArray[np.bool_] | bool = True,
    others: float | None = None,
) -> F:
    """The arithmetic of products, in the tile that is fastest.

        tiles = ⌈m/tm⌉·⌈n/tn⌉·batch      waves = ⌈tiles · parts / multiprocessors⌉
        time  = waves · 2·tm·tn·(k/parts + start_k) / (rate / multiprocessors · fraction · I/(I + half))

    I = tm·tn/(tm + tn) is the tile's arithmetic for each element it loads. Where tiles are fewer than multiprocessors
    and kernels can do that (`split`), k is split into `parts`. Tiles have these rows and columns or more. Kernels of
    which a multiprocessor runs `others` + 1 tiles at once have no waves, but take as long as all of them at least; in
    them k is split until multiprocessors are full `SPLIT_WAVES` times over.
    """
    best: F | None = None
    full = sms if others is None else SPLIT_WAVES * (others + 1) * sms
    for tm, tn in (tile for tile in TILES if tile[0] >= rows and tile[1] >= columns):
        intensity = tm * tn / (tm + tn)
        tiles = np.ceil(m / tm) * np.ceil(n / tn) * batch
        parts = np.where(split, np.maximum(1.0, np.minimum(np.floor(full / tiles), np.floor(k / 128))), 1.0)
        waves = np.ceil(tiles * parts / sms) if others is None else np.maximum(tiles * parts / sms, 1.0) + others
        each = 2.0 * tm * tn * (k / parts + start_k) / (rate / sms * fraction * intensity / (intensity + half))
        best = waves * each if best is None else np.minimum(best, waves * each)
    assert best is not None
    return best


def product_ns(shapes: Sequence[ProductShape], machine: Machine, c: CostNumbers) -> F:
    if not shapes:
        return np.empty(0)
    kernels, dtypes, *sizes = _columns(shapes)
    batch, m, n, k = _sizes(sizes[:4])
    (nbytes,) = _floats(sizes[4:])
    ns = np.empty(len(shapes))
    for dtype in sorted(set(dtypes.tolist())):
        for kernel in sorted(set(kernels[dtypes == dtype].tolist())):
            at = (dtypes == dtype) & (kernels == kernel)
            rate, tensor = machine.matrix_rate(dtype, False)
            fraction, memory = machine.measured(kernel, c.tensor_fraction if tensor else c.core_fraction, c.stream)
            half, start = (c.tensor_half, c.tensor_start) if tensor else (0.0, c.core_start)
            sides = (batch[at], m[at], n[at], k[at])
            sms = machine.multiprocessors
            work = tiled_ns(*sides, rate, fraction, half, start, sms, 64, 64 if tensor else 32)
            if not tensor:
                many = tiled_ns(*sides, rate, fraction, half, start, sms, machine.batched_rows, split=False)
                work = np.where(batch[at] == 1, work, many)
                if machine.before_volta:
                    work = np.where(batch[at] == 1, np.maximum(work, _read_again(*sides[1:], machine, c)), work)
            traffic = _traffic(nbytes[at], machine, memory)
            ns[at] = _both(work, traffic, c) if tensor else np.maximum(work, traffic / c.core_traffic)
    return ns + machine.start_ns


def _read_again(m: F, n: F, k: F, machine: Machine, c: CostNumbers) -> F:
    """Where one wave of tiles does not reach over all columns, each row of tiles reads them again, in short pieces."""
    wave = 2 * machine.multiprocessors * 128
    passes = np.maximum(1.0, np.ceil(m / 128) / np.maximum(1.0, wave / n))
    return np.where(passes > 1, 4 * n * k * passes / (machine.dram * c.read_again), 0.0)


def _both(work: F, traffic: F, c: CostNumbers) -> F:
    """Arithmetic and traffic of tensor cores go on at once, but for a part of the shorter."""
    return np.maximum(work, traffic) + c.unhidden * np.minimum(work, traffic)


def _traffic(nbytes: F, machine: Machine, fraction: F | float) -> F:
    return nbytes / (machine.dram * fraction)


# -- convolutions --------------------------------------------------------------------------------


def convolution_ns(shapes: Sequence[ConvShape], machine: Machine, c: CostNumbers) -> F:
    if not shapes:
        return np.empty(0)
    dtypes, ways, *rest = _columns(shapes)
    batch, c_in, c_out, groups, out_pixels, window, in_pixels = _sizes(rest[:7])
    biased, nhwc = _floats(rest[7:])
    item = np.where(np.isin(dtypes, LOW), 2.0, np.where(dtypes == "float64", 8.0, 4.0))
    x, y = batch * c_in * in_pixels * item, batch * c_out * out_pixels * item
    w = c_in * c_out / groups * window * item
    data, weight = ways == "data", ways == "weight"
    # the implicit product: rows, columns, sum
    m = np.where(weight, c_out / groups, batch * np.where(data, in_pixels, out_pixels))
    n = np.where(weight, c_in / groups * window, np.where(data, c_in, c_out) / groups)
    stride = np.maximum(1.0, in_pixels / out_pixels)
    k = np.where(weight, batch * out_pixels, np.where(data, c_out * window / stride, c_in * window) / groups)
    ns = np.empty(len(shapes))
    for dtype in sorted(set(dtypes.tolist())):
        at = dtypes == dtype
        rate, tensor = machine.matrix_rate(dtype, True)
        part = [a[at] for a in (batch, c_in, c_out, groups, m, n, k, x, y, w, window, out_pixels, in_pixels)]
        dense = _dense(part, ways[at], nhwc[at] > 0, dtype, rate, tensor, machine, c)
        single = (groups[at] > 1) & (groups[at] == c_in[at])
        ns[at] = np.where(single, _depthwise(part, ways[at], nhwc[at] > 0, dtype, machine, c), dense)
    pass_over = np.where(weight, y, 2 * y)  # the bias: a sum over y's gradient, or y read and written once more
    return ns + machine.start_ns + np.where(biased > 0, pass_over / (machine.dram * c.stream) + machine.start_ns, 0.0)


def _dense(
    part: list[F],
    ways: npt.NDArray[Any],
    nhwc: npt.NDArray[np.bool_],
    dtype: str,
    rate: float,
    tensor: bool,
    machine: Machine,
    c: CostNumbers,
) -> F:
    batch, _, _, groups, m, n, k, x, y, w, window, out_pixels, in_pixels = part
    kept = np.where(ways == "weight", c.weight_gradient, 1.0)
    # forward's product and the data's have the pixels as one side, the weights' has a group's few channels both ways
    grouped = np.where(groups > 1, np.where(ways == "weight", c.grouped**2, c.grouped), 1.0)
    cores, memory = machine.measured("conv", c.core_fraction, c.stream)
    sms = machine.multiprocessors
    share, split = cores * kept * grouped, ways == "weight"
    plain = tiled_ns(groups, m, n, k, machine.cores, share, 0.0, c.core_start, sms, 64, 32, split, c.conv_others)
    same = (window == 9) & (groups == 1) & (np.abs(in_pixels / out_pixels - 1) < 0.5) & (ways != "weight")
    direct = np.maximum(plain, _traffic(x + y + w, machine, memory))
    folded = _winograd(part, cores * kept * c.winograd, machine, memory, c)
    simple = np.where(same, np.minimum(direct, folded), direct)
    nbytes = x + y + w
    if not tensor:
        return simple
    fraction, memory = machine.measured("conv", c.tensor_fraction * c.conv_tensor, c.stream)
    padded = [np.ceil(v / CHANNELS_OF_TENSOR_CORES) * CHANNELS_OF_TENSOR_CORES for v in (n, k)]
    work = tiled_ns(
        groups, m, padded[0], padded[1], rate, fraction * kept * grouped, c.tensor_half, c.tensor_start, sms
    )
    turned = np.where(nhwc, 0.0, 2 * nbytes / (machine.dram * c.layout_change) + 3 * machine.start_ns)
    if dtype == "float32":
        turned = np.zeros_like(turned)  # TF32 kernels take NCHW as it is
    traffic = _traffic(nbytes, machine, memory)
    best = _both(work, traffic, c) + turned
    if dtype == "float32":
        best = np.minimum(best, simple)  # TF32 or the cores, whatever is faster
    # a window of one pixel is a product for each image, which takes NCHW as it is: its columns are the image's pixels
    share = fraction * kept * grouped * c.pointwise
    images = np.where(ways == "weight", groups, batch * groups)
    columns = np.where(ways == "weight", padded[0], out_pixels)
    rows = np.where(ways == "weight", m, n)
    alone = tiled_ns(images, rows, columns, padded[1], rate, share, c.tensor_half, c.tensor_start, sms, 64)
    return np.where((window == 1) & ~nhwc & (ways != "weight"), np.minimum(best, _both(alone, traffic, c)), best)


def _winograd(part: list[F], fraction: F, machine: Machine, memory: float, c: CostNumbers) -> F:
    """Winograd's F(4×4, 3×3): 36 products for 16 results, and four kernels: both tensors are turned, the weights, back.

    For many channels and few pixels turning the weights is most of the work.
    """
    batch, _, _, _, _, n, k, x, y, w, _, out_pixels, _ = part
    channels = np.maximum(k / 9, 1)
    tiles = batch * np.ceil(np.sqrt(out_pixels) / 4) ** 2
    points, sms = np.full_like(n, 36.0), machine.multiprocessors
    work = tiled_ns(
        points, tiles, n, channels, machine.cores, fraction, 0.0, c.core_start, sms, 64, 32, False, c.conv_others
    )
    item = w / np.maximum(n * channels * 9, 1)
    turned = (x + y + 2 * 36 * tiles * (channels + n) * item) * c.winograd_traffic
    return work + _traffic(turned + 9 * w, machine, memory) + 3 * machine.start_ns


def _depthwise(
    part: list[F], ways: npt.NDArray[Any], nhwc: npt.NDArray[np.bool_], dtype: str, machine: Machine, c: CostNumbers
) -> F:
    """A thread for each result, no products of matrices: bound by traffic, or by multiplications on the cores.

    PyTorch asks cuDNN where that is faster (`_in_library`), whose kernels keep tiles of pixels at hand. In own loops
    finding a result's place takes as long as some of its multiplications; their weights' gradient has a block for each
    channel and tap, whose reads lie `stride` apart.
    """
    batch, _, c_out, _, _, _, _, x, y, w, window, out_pixels, in_pixels = part
    apart = np.sqrt(np.maximum(1.0, in_pixels / out_pixels))  # the stride
    library = nhwc | _in_library(c_out, window, in_pixels, apart, dtype)
    weight = ways == "weight"
    one = 2 * batch * c_out * out_pixels
    # one of the two tensors that the weights' gradient reads has the stride
    loops = one * (window + c.depthwise_taps) * np.where(weight, (1 + apart) / 2, 1.0)
    # fewer blocks than fit leave multiprocessors idle
    busy = np.minimum(1.0, c_out * window / (BLOCKS_OF_A_MULTIPROCESSOR * machine.multiprocessors))
    share = np.where(weight, c.depthwise_weight * busy, c.depthwise)
    library_share = np.where(weight, c.depthwise_library_weight, c.depthwise_library)
    work = np.where(library, one * window / library_share, loops / share) / (machine.hardware.peak("float32") / 1e9)
    return _both(work, _traffic(x + y + w, machine, c.stream), c)


def _in_library(channels: F, window: F, in_pixels: F, stride: F, dtype: str) -> npt.NDArray[np.bool_]:
    """Where PyTorch asks cuDNN for a depthwise convolution of NCHW tensors (ATen's `use_cudnn_depthwise`).

    In low precision, for windows of 1, 3 and 5, from 32 channels and 7 pixels a side on; with a stride for many only.
    """
    few = (stride > 1.4) & (channels < 512) & ((channels < 256) | (in_pixels < 28**2))
    return (dtype in LOW) & np.isin(window, (1, 9, 25)) & (channels >= 32) & (in_pixels >= 7**2) & ~few


# -- attention -----------------------------------------------------------------------------------


def attention_ns(shapes: Sequence[AttentionShape], machine: Machine, c: CostNumbers) -> F:
    if not shapes:
        return np.empty(0)
    dtypes, _, *rest = _columns(shapes)
    batch, queries, keys, size = _sizes(rest[:4])
    flops, nbytes = _floats(rest[4:])
    ns = np.empty(len(shapes))
    for dtype in sorted(set(dtypes.tolist())):
        at = dtypes == dtype
        rate, tensor = machine.matrix_rate(dtype, False)
        whole, memory = machine.measured("attention", c.tensor_fraction if tensor else c.core_fraction, c.stream)
        share = whole * c.attention
        # queries in blocks of 128, keys of 64, the head's size as 32, 64, 96, 128, …
        waste = np.ceil(queries / 128) * 128 / queries * np.ceil(keys / 64) * 64 / keys * np.ceil(size / 32) * 32 / size
        blocks = np.ceil(queries / 128) * batch
        waves = np.ceil(blocks / machine.multiprocessors) / (blocks / machine.multiprocessors)
        work = (flops * waste * waves)[at] / (rate * share)
        ns[at] = _both(work, _traffic(nbytes[at], machine, memory), c)
    return ns + machine.start_ns


# -- streams -------------------------------------------------------------------------------------


def stream_ns(shapes: Sequence[StreamShape], machine: Machine, c: CostNumbers) -> F:
    if not shapes:
        return np.empty(0)
    kernels, kinds, *rest = _columns(shapes)
    read, written, run, _, _, planes, pixels = _floats(rest)
    fraction = np.full(len(shapes), c.stream)
    for kind in sorted(set(kinds.tolist())):
        fraction[kinds == kind] *= float(getattr(c, kind, 1.0))
    for kernel in {e.kernel for e in machine.hardware.efficiencies}:
        fraction = np.where(kernels == kernel, machine.measured(kernel, 1.0, 1.0)[1], fraction)
    # DRAM and L2 move 32 bytes at least; in pieces shorter than that most of what is moved is not used
    fraction = fraction * np.maximum(run, 1) / (np.maximum(run, 1) + c.short_run_bytes)
    # a thread for each pixel reads plane after plane: with many planes of few pixels most of the bandwidth is idle
    rounds = np.maximum(1.0, pixels / (THREADS_OF_A_MULTIPROCESSOR * machine.multiprocessors))
    waited = planes * rounds * c.dram_latency_ns
    return np.maximum((read + written) / (machine.dram * fraction), waited) + machine.start_ns


# Formula, and the field of `Shapes` that it prices, in the order in which ops name families.
FAMILIES: tuple[tuple[Callable[[Sequence[Any], Machine, CostNumbers], F], str], ...] = (
    (product_ns, "products"),
    (convolution_ns, "convolutions"),
    (attention_ns, "attentions"),
    (stream_ns, "streams"),
)


def family_times(shapes: Shapes, hardware: Hardware, numbers: CostNumbers) -> list[list[float]]:
    """Nanoseconds of each shape, by family in the order of `Shapes`."""
    machine = Machine.of(hardware, numbers)
    return [formula(list(getattr(shapes, name)), machine, numbers).tolist() for formula, name in FAMILIES]
