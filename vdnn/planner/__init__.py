"""Search: plans that are judged by the simulator before anyone runs them."""

from vdnn.planner.budget import plan_for_budget

__all__ = ["plan_for_budget"]
