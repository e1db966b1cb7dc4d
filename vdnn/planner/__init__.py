"""Search: plans that are judged by the simulator before anyone runs them, and bounds that no plan goes below."""

from vdnn.planner.bound import Bound, least_memory, time_bound
from vdnn.planner.budget import Planned, best_plan, least_plan, plan_for_budget, some_plan
from vdnn.planner.gaps import GapParts, gap_parts
from vdnn.planner.scaling import scaled_plan
from vdnn.planner.shrinking import BUDGETED, budgeted_plan

__all__ = [
    "BUDGETED",
    "Bound",
    "GapParts",
    "Planned",
    "best_plan",
    "budgeted_plan",
    "gap_parts",
    "least_memory",
    "least_plan",
    "plan_for_budget",
    "scaled_plan",
    "some_plan",
    "time_bound",
]
