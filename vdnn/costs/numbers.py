"""The fitted numbers of the cost model: fractions and sizes with a physical meaning, none of them for a model."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources

from vdnn.errors import FormatError
from vdnn.values.codec import decode

__all__ = ["CostNumbers", "Fitted", "Spread", "fitted"]


@dataclass(frozen=True, slots=True)
class CostNumbers:
    """Every number of the model, for one family of GPUs. Fractions are of a rate of the machine's datasheet.

    Products of matrices (`core`: on the cores for fp32, `tensor`: on tensor cores)
        core_fraction, tensor_fraction   of the peak, in the main loop of a large product
        core_start, tensor_start         steps of the sum that the beginning and the end of a tile take
        tensor_half                      arithmetic for each element loaded at which tensor cores run at half speed
        unhidden                         part of the shorter of arithmetic and traffic that the other does not hide
        fp32_pj_per_flop                 energy of a flop on the cores of a 12 nm chip: the power limit bounds the rate
        energy_exponent                  the energy grows with that power of the process
    Convolutions
        conv_core, conv_tensor           against a product of the same size
        winograd                         the products inside Winograd's algorithm, the same
        data_gradient, weight_gradient   against forward
        grouped                          with groups, each a product of its own: for each side of a group's channels
        layout_change                    of the bandwidth, when NCHW is turned to NHWC around tensor cores, and back
        pointwise                        windows of one pixel as products on NCHW tensors, against those on NHWC
        depthwise, depthwise_weight      of the fp32 peak, in PyTorch's own loops
        depthwise_taps                   multiplications that a result's own address takes as long as
        depthwise_library, depthwise_library_weight    the same fractions in cuDNN's kernels, without addresses
    attention                            fused: against a product
    Streams: fractions of the bandwidth
        stream                           kernels that read and write once, in order
        batch_norm, batch_norm_backward, layer_norm, layer_norm_backward, softmax, reduce, pool, pool_backward, gather,
        scatter                          of `stream`, counting each input and output once, though some read it twice
        layer_norm_low                   the same of a forward alone in low precision, where libraries leave out casts
                                         to fp32 (timm's fast norm): above 1, as fewer bytes move than are captured
        short_run_bytes                  bytes side by side at which half of what is moved is used
        short_row_bytes                  bytes of a normalised row at which half of the time goes into its sums
        l2_reuse                         part of the L2 cache that holds what the kernel before left there
    Starts
        kernel_start                     of a kernel, in the machine's `kernel_ns`
        host_view, host_backward         host time of a view, and of an op of backward, against `launch_ns` of an op
    """

    core_fraction: float
    core_start: float
    fp32_pj_per_flop: float
    energy_exponent: float
    tensor_fraction: float
    tensor_half: float
    tensor_start: float
    unhidden: float
    conv_core: float
    conv_tensor: float
    winograd: float
    data_gradient: float
    weight_gradient: float
    grouped: float
    layout_change: float
    pointwise: float
    depthwise: float
    depthwise_weight: float
    depthwise_library: float
    depthwise_library_weight: float
    depthwise_taps: float
    attention: float
    stream: float
    batch_norm: float
    batch_norm_backward: float
    layer_norm: float
    layer_norm_low: float
    layer_norm_backward: float
    softmax: float
    reduce: float
    pool: float
    pool_backward: float
    gather: float
    scatter: float
    short_run_bytes: float
    short_row_bytes: float
    l2_reuse: float
    kernel_start: float
    host_view: float
    host_backward: float


@dataclass(frozen=True, slots=True)
class Spread:
    """How measured times lie around predictions of rows that the fit did not see: factors of the predicted time.

    `coverage` of them lie between `low` and `high`.
    """

    coverage: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Fitted:
    """What `vdnn fit` wrote: the numbers, the spread on GPUs with rows in the fit and on others, their provenance."""

    numbers: CostNumbers
    known_gpus: tuple[str, ...]
    known: Spread
    unseen: Spread
    provenance: dict[str, str]

    def spread(self, gpu: str) -> Spread:
        """The spread of predictions for a GPU."""
        return self.known if gpu in self.known_gpus else self.unseen


@functools.cache
def fitted() -> Fitted:
    """The numbers of the package, `fitted.toml`."""
    return read_fitted((resources.files("vdnn.costs") / "fitted.toml").read_text(), "vdnn/costs/fitted.toml")


def read_fitted(text: str, name: str) -> Fitted:
    """Fitted numbers from their file.

    Raises:
        FormatError: a number is missing, unknown or not more than 0.
    """
    data = tomllib.loads(text)
    numbers = decode(CostNumbers, data.get("numbers"))
    for field in CostNumbers.__slots__:
        if not getattr(numbers, field) >= 0:
            raise FormatError(f"{name}: {field} is {getattr(numbers, field)}, it must not be negative")
    intervals = data.get("intervals", {})
    known, unseen = (decode(Spread, intervals.get(which)) for which in ("known", "unseen"))
    gpus = tuple(map(str, intervals.get("known_gpus", ())))
    return Fitted(numbers, gpus, known, unseen, {key: str(value) for key, value in data.get("provenance", {}).items()})
