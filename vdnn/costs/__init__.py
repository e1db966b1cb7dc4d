"""What an op costs on a `Hardware`: a roofline with a table of efficiencies."""

from vdnn.costs.convolutions import times_with
from vdnn.costs.roofline import DEFAULTS, op_times

__all__ = ["DEFAULTS", "op_times", "times_with"]
