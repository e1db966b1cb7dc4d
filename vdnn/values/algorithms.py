"""`AlgorithmTable`: what each convolution algorithm of a library takes, in time and in workspace.

    table = algorithm_table("cudnn4")
    table.offers(op)                    what there is for one convolution, fastest first; the last needs no workspace
    table.least(op), table.fastest(op)  the paper's (m) and (p)

A table is a TOML file in `tables/`, with the source of each number. Algorithms are of three kinds:

* gemm: 2 flops a multiply-add of the direct sum. Implicit GEMM needs no workspace and runs at a fixed fraction
  of the rate of the variant with precomputed offsets.
* fft: one transform of `tile` × `tile` holds a feature map; a complex product of the transforms, 8 flops each.
* fft-tiling: the same with many tiles a feature map.

Feature maps are taken for square, as a trace's op only counts pixels; FFT needs stride 1.
"""

from __future__ import annotations

import functools
import math
import tomllib
from bisect import bisect_left
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from vdnn.errors import unknown_name
from vdnn.values.codec import decode
from vdnn.values.trace import Op

__all__ = ["GRADIENTS", "IMPLICIT_GEMM", "Algorithm", "AlgorithmTable", "Offer", "algorithm_table", "table_ids"]

IMPLICIT_GEMM = "implicit-gemm"
GRADIENTS = ("weight gradient", "input gradient")  # names of ops that make one of them
Role = Literal["forward", "weight gradient", "input gradient", "both gradients"]
_ITEM = 4  # bytes of a float32, which is what cuDNN 4 transforms


@dataclass(frozen=True, slots=True)
class Offer:
    """One algorithm for one convolution, in one direction of the step."""

    algorithm: str
    time_ns: int
    workspace_bytes: int


@dataclass(frozen=True, slots=True)
class Algorithm:
    """Rates in flops of the kind's own count a second, by `channels`: the geometric mean of input and output channels.

    A matrix product sees a filter's channels and pixels as one length: for gemm the input channels are those of
    the 3 × 3 filter (Fig. 6 has no other) that has as many weights.
    """

    name: str
    kind: Literal["gemm", "fft", "fft-tiling"]
    channels: tuple[int, ...]
    forward_flops_per_s: tuple[int, ...]
    backward_flops_per_s: tuple[int, ...]
    tile: int = 0
    least_channels: int = 1

    def rate(self, shape: Shape, backward: bool) -> float:
        """Flops a second: interpolated between the channels shown, in proportion below, constant above."""
        rates = self.backward_flops_per_s if backward else self.forward_flops_per_s
        length = shape.channels * (shape.kernel_pixels / 9 if self.kind == "gemm" else 1)
        mean = math.sqrt(length / shape.groups * shape.filters)
        if mean <= self.channels[0]:
            return rates[0] * mean / self.channels[0]
        if mean >= self.channels[-1]:
            return rates[-1]
        i = bisect_left(self.channels, mean)
        low, high = self.channels[i - 1], self.channels[i]
        return rates[i - 1] + (rates[i] - rates[i - 1]) * math.log(mean / low) / math.log(high / low)

    def applies(self, shape: Shape) -> bool:
        """Whether the library has it for such a convolution."""
        if self.kind == "gemm":
            return True
        one = shape.side + shape.kernel - 1 <= self.tile
        whole = one if self.kind == "fft" else not one and shape.kernel <= self.tile // 2
        thick = min(shape.channels, shape.filters) >= self.least_channels
        return shape.stride_one and shape.groups == 1 and whole and thick

    def flops(self, shape: Shape) -> int:
        """Of one pass: forward, or one of the two of backward."""
        if self.kind == "gemm":
            per_group = shape.channels // shape.groups
            return 2 * shape.batch * per_group * shape.filters * shape.side_pixels * shape.kernel_pixels
        complexes = self._transform_bytes() // 8
        return 8 * shape.channels * shape.filters * shape.batch * self._tiles(shape) * complexes

    def workspace_bytes(self, shape: Shape, role: Role) -> int:
        """See the table's sources: what Fig. 5 of the vDNN paper shows of forward, as a formula.

        The input's gradient is a convolution with channels and filters exchanged; the weights' gradient is one
        whose sum runs over the batch.
        """
        if role == "both gradients":
            return max(self.workspace_bytes(shape, "input gradient"), self.workspace_bytes(shape, "weight gradient"))
        n, c, k = shape.batch, shape.channels, shape.filters
        if self.kind == "gemm":
            return _ITEM * c * shape.kernel_pixels
        weights = _ITEM * c * k * shape.kernel_pixels
        if role == "input gradient":
            c, k = k, c
        if self.kind == "fft":
            operands = n * (c + k) if role == "weight gradient" else c * (k + n)
            return 2 * operands * self._transform_bytes() + weights
        return (c * k + 4 * n * c + 2 * n * k) * self._transform_bytes() + weights

    def _transform_bytes(self) -> int:
        """A real tile's transform: half of the complex plane, by symmetry."""
        return self.tile * (self.tile // 2 + 1) * 8

    def _tiles(self, shape: Shape) -> int:
        return (-(-shape.side // (self.tile - shape.kernel + 1))) ** 2


@dataclass(frozen=True, slots=True)
class Shape:
    """A convolution by its sizes, as `Op.dims` of kernel "conv" has them."""

    batch: int
    channels: int
    filters: int
    groups: int
    side_pixels: int
    kernel_pixels: int
    input_pixels: int

    @property
    def side(self) -> int:
        """Height and width of the output."""
        return math.isqrt(self.side_pixels)

    @property
    def kernel(self) -> int:
        """Height and width of a filter."""
        return math.isqrt(self.kernel_pixels)

    @property
    def stride_one(self) -> bool:
        """Whether sizes allow stride 1 with a padding of at most half the filter."""
        return self.side >= math.isqrt(self.input_pixels) - self.kernel + 1


@dataclass(frozen=True, slots=True)
class AlgorithmTable:
    """Algorithms of one library, as seen on a GPU of `peak_flops_per_s` (float32).

    `traffic_permille` is what layers without arithmetic reach of the DRAM bandwidth there.
    """

    id: str
    name: str
    peak_flops_per_s: int
    implicit_gemm_permille: int
    traffic_permille: int
    algorithms: tuple[Algorithm, ...]
    sources: tuple[tuple[str, str], ...]

    def offers(self, op: Op, peak_flops_per_s: int | None = None) -> tuple[Offer, ...]:
        """Every algorithm that is worth naming for an op of kernel "conv": faster ones need more workspace.

        Args:
            peak_flops_per_s: float32 peak of the GPU that it runs on; rates go in proportion to it.
        """
        shape = Shape(*op.dims[:7])
        backward = op.phase == "backward"
        role: Role = "forward"
        if backward:
            role = op.name if op.name in GRADIENTS else "both gradients"  # type: ignore[assignment]
        scale = (peak_flops_per_s or self.peak_flops_per_s) / self.peak_flops_per_s
        found = []
        for algorithm in self.algorithms:
            if not algorithm.applies(shape):
                continue
            passes = max(1, round(op.flops / max(Algorithm.flops(_DIRECT, shape), 1)))
            seconds = passes * algorithm.flops(shape) / (algorithm.rate(shape, backward) * scale)
            nanoseconds = math.ceil(seconds * 1e9)
            found.append(Offer(algorithm.name, nanoseconds, algorithm.workspace_bytes(shape, role)))
            if algorithm.kind == "gemm":
                slower = math.ceil(seconds * 1e12 / self.implicit_gemm_permille)
                found.append(Offer(IMPLICIT_GEMM, slower, 0))
        found.sort(key=lambda offer: (offer.time_ns, offer.workspace_bytes))
        worth: list[Offer] = []
        for offer in found:
            if not worth or offer.workspace_bytes < worth[-1].workspace_bytes:
                worth.append(offer)
        return tuple(worth)


_DIRECT = Algorithm("direct", "gemm", (), (), ())


def table_ids() -> tuple[str, ...]:
    """Ids of the tables that vdnn has."""
    folder = resources.files("vdnn.values") / "tables"
    return tuple(sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml")))


@functools.cache
def algorithm_table(name: str) -> AlgorithmTable:
    """A table by id.

    Raises:
        UsageError: no such table; names the nearest.
    """
    if name not in table_ids():
        raise unknown_name("algorithm table", name, table_ids())
    data = tomllib.loads((resources.files("vdnn.values") / "tables" / f"{name}.toml").read_text())
    data["algorithms"] = data.pop("algorithm")
    data["sources"] = [list(item) for item in data["sources"].items()]
    return decode(AlgorithmTable, data)
