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
        core_fraction, tensor_fraction   of the peak, in the main loop of a large product; gaming cards, whose clock is
                                         above their datasheet's, reach more than 1
        core_start, tensor_start         steps of the sum that the beginning and the end of a tile take
        core_traffic                     of `stream`, that products on the cores reach where memory bounds them
        read_again                       of the bandwidth, at which chips before Volta read columns a second time
        tensor_half                      arithmetic for each element loaded at which tensor cores run at half speed
        unhidden                         part of the shorter of arithmetic and traffic that the other does not hide
        fp32_pj_per_flop                 energy of a flop on the cores of a 12 nm chip: the power limit bounds the rate
        power_settles_ns                 length of a kernel, measured alone, at which the limit has half of its effect
    Convolutions
        conv_tensor                      against a product of the same size
        conv_others                      tiles that a multiprocessor works on beside the first, on the cores
        winograd, winograd_traffic       the products inside Winograd's algorithm, against a product; part of the
                                         traffic of its transforms that caches do not hold
        weight_gradient                  against forward
        grouped                          with groups, each a product of its own: for each side of a group's channels
        layout_change                    of the bandwidth, when NCHW is turned to NHWC around tensor cores, and back
        pointwise                        windows of one pixel as products on NCHW tensors, against those on NHWC
        depthwise, depthwise_weight      of the fp32 peak, in PyTorch's own loops
        depthwise_taps                   multiplications that a result's own address takes as long as
        depthwise_library, depthwise_library_weight    the same fractions in cuDNN's kernels, without addresses
    attention                            fused: against a product
    Streams: fractions of the bandwidth
        stream                           kernels that read and write once, in order
        batch_norm_backward, layer_norm, layer_norm_backward, softmax, pool_backward, gather, scatter
                                         of `stream`, counting each input and output once, though some read it twice
        short_run_bytes                  bytes side by side at which half of what is moved is used
        dram_latency_ns                  from a read to its result, where each thread waits for one after the other
    Starts
        kernel_start                     of a kernel, in the machine's `kernel_ns`
        host_view, host_backward         host time of a view, and of an op of backward, against `launch_ns` of an op
    """

    core_fraction: float
    core_start: float
    core_traffic: float
    read_again: float
    fp32_pj_per_flop: float
    power_settles_ns: float
    tensor_fraction: float
    tensor_half: float
    tensor_start: float
    unhidden: float
    conv_tensor: float
    conv_others: float
    winograd: float
    winograd_traffic: float
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
    batch_norm_backward: float
    layer_norm: float
    layer_norm_backward: float
    softmax: float
    pool_backward: float
    gather: float
    scatter: float
    short_run_bytes: float
    dram_latency_ns: float
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
