"""What an op costs on a `Hardware`: a roofline with a table of efficiencies."""

from vdnn.costs.roofline import DEFAULTS, op_times

__all__ = ["DEFAULTS", "op_times"]
