"""The time of an op: the longest of its arithmetic, its memory traffic, and the least time of a kernel.

    time = max(flops / (peak × compute efficiency), bytes / (DRAM bandwidth × memory efficiency), kernel_ns)

A view runs no kernel and takes no time on the device. The efficiencies come from the hardware where somebody
measured them (`Hardware.efficiencies`), else from `DEFAULTS`. The defaults are ASSUMPTIONS, round numbers for
"a good library kernel at a large size" that nobody measured here; a time that rests on them may be wrong by a
factor of two for one op, and says more about ratios than about seconds.

Which peak: convolution, matmul, attention and RNN kernels run at the peak of the op's dtype (tensor cores where
the hardware has them), everything else at the float32 peak. A float32 *convolution* runs at the "tf32" peak
where there is one, a float32 *matmul* does not: those are PyTorch's defaults
(`torch.backends.cudnn.allow_tf32` is True, `torch.backends.cuda.matmul.allow_tf32` is False).
"""

from __future__ import annotations

from vdnn.costs.measured import measured_times
from vdnn.values.hardware import Hardware
from vdnn.values.trace import Kernel, Op, Trace

__all__ = ["DEFAULTS", "op_times"]

# class of kernel: thousandths of the arithmetic peak, of the DRAM bandwidth. Assumed; see above.
DEFAULTS: dict[Kernel, tuple[int, int]] = {
    "conv": (600, 750),
    "matmul": (700, 750),
    "attention": (500, 750),
    "rnn": (300, 600),
    "norm": (500, 750),
    "pool": (500, 750),
    "elementwise": (500, 850),
    "reduce": (500, 800),
    "copy": (500, 850),
    "embedding": (500, 500),
    "view": (1000, 1000),
    "other": (300, 600),
}
_MATRIX = ("conv", "matmul", "attention", "rnn")


def op_times(trace: Trace, hardware: Hardware) -> list[int]:
    """Nanoseconds of each op on the device, rounded up."""
    if hardware.timings:
        return measured_times(trace, hardware)
    table = {str(kernel): efficiency for kernel, efficiency in DEFAULTS.items()}
    table.update({e.kernel: (e.compute_permille, e.memory_permille) for e in hardware.efficiencies})
    rates = {
        (kernel, dtype): _peak(hardware, kernel, dtype) for kernel, dtype in {(op.kernel, op.dtype) for op in trace.ops}
    }
    dram = hardware.dram_bytes_per_s
    return [_time(op, table[op.kernel], rates[op.kernel, op.dtype], dram, hardware.kernel_ns) for op in trace.ops]


def _peak(hardware: Hardware, kernel: Kernel, dtype: str) -> int:
    if kernel not in _MATRIX:
        return hardware.peak("float32")
    if kernel == "conv" and dtype == "float32" and any(p.dtype == "tf32" for p in hardware.peaks):
        # a card's tf32 rate may be no more than its float32 rate; cuDNN takes the faster
        return max(hardware.peak("tf32"), hardware.peak("float32"))
    return hardware.peak(dtype)


def _time(op: Op, efficiency: tuple[int, int], peak: int, dram: int, kernel_ns: int) -> int:
    if op.kernel == "view":
        return 0
    compute = -(-op.flops * 10**12 // (peak * efficiency[0]))
    memory = -(-(op.read_bytes + op.written_bytes) * 10**12 // (dram * efficiency[1]))
    return max(compute, memory, kernel_ns)
