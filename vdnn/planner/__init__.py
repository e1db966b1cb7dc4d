"""Search: plans that are judged by the simulator before anyone runs them."""

from vdnn.planner.budget import plan_for_budget
from vdnn.planner.shrinking import BUDGETED, budgeted_plan

__all__ = ["BUDGETED", "budgeted_plan", "plan_for_budget"]
