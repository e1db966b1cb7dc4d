"""Search: plans that are judged by the simulator before anyone runs them."""

from vdnn.planner.budget import plan_for_budget
from vdnn.planner.dyn import dyn_plan

__all__ = ["dyn_plan", "plan_for_budget"]
