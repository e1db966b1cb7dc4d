"""The time of each op on a machine, on the device and on the host."""

from __future__ import annotations

from collections.abc import Sequence

from vdnn.costs.measured import measured_times
from vdnn.costs.numbers import CostNumbers, fitted
from vdnn.costs.shapes import Shapes, shapes_of
from vdnn.values.hardware import Hardware
from vdnn.values.trace import Trace

__all__ = ["host_times", "op_times"]


def op_times(trace: Trace, hardware: Hardware, numbers: CostNumbers | None = None) -> list[int]:
    """Nanoseconds of each op on the device, rounded up; 0 for a view. Without `numbers`: those of the package.

    A machine whose kernels were measured one by one has its own times (`vdnn.costs.measured`).
    """
    if hardware.timings:
        return measured_times(trace, hardware)
    from vdnn.costs.kernel_times import family_times  # numpy, which takes a while to load

    shapes = Shapes()
    parts = shapes_of(trace, shapes)
    times = [
        [-int(-ns // 1) for ns in family] for family in family_times(shapes, hardware, numbers or fitted().numbers)
    ]
    return [sum(times[family][number] for family, number in op) for op in parts]


def host_times(trace: Trace, hardware: Hardware, numbers: CostNumbers | None = None) -> Sequence[int]:
    """Nanoseconds that the host takes to issue each op: a view starts no kernel, backward's engine is not Python."""
    launch = hardware.launch_ns
    if hardware.timings:
        return [launch] * len(trace.ops)
    c = numbers or fitted().numbers
    view, backward = round(launch * c.host_view), round(launch * c.host_backward)
    return [view if op.kernel == "view" else backward if op.phase == "backward" else launch for op in trace.ops]
