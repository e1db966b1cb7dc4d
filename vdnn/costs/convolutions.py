"""The time of an op where a plan names convolution algorithms: by their table instead of the model.

CONV                             the algorithm's time, but no less than the op's DRAM traffic takes
POOL, activations, copies        their DRAM traffic, at the efficiency that the table has for it
everything else                  the cost model
"""

from __future__ import annotations

from collections.abc import Mapping

from vdnn.analysis.convolutions import traffic_ops
from vdnn.costs.times import op_times
from vdnn.values.algorithms import Offer, algorithm_table
from vdnn.values.hardware import Hardware
from vdnn.values.trace import Op, Trace

__all__ = ["times_with"]


def times_with(trace: Trace, hardware: Hardware, chosen: Mapping[int, Offer], table: str) -> list[int]:
    """Nanoseconds of each op with the algorithms of `chosen`; those of the cost model without a table."""
    times = op_times(trace, hardware)
    if not table:
        return times
    rate = hardware.dram_bytes_per_s * algorithm_table(table).traffic_permille
    for i in traffic_ops(trace):
        times[i] = max(_traffic(trace.ops[i], rate), hardware.kernel_ns)
    for i, offer in chosen.items():
        times[i] = max(offer.time_ns, _traffic(trace.ops[i], rate), hardware.kernel_ns)
    return times


def _traffic(op: Op, rate: int) -> int:
    return -(-(op.read_bytes + op.written_bytes) * 10**12 // rate)
