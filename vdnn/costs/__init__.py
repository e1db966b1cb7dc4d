"""What an op costs on a `Hardware`: formulas by class of kernel, with numbers fitted to published measurements."""

from vdnn.costs.convolutions import times_with
from vdnn.costs.numbers import CostNumbers, Spread, fitted
from vdnn.costs.times import host_times, op_times

__all__ = ["CostNumbers", "Spread", "fitted", "host_times", "op_times", "times_with"]
