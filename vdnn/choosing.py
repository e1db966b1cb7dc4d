"""Which plan is asked for: a policy's, the planner's for a budget, or that of a policy that decides for a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vdnn.errors import UsageError, unknown_name
from vdnn.values import Hardware, Plan, Trace

if TYPE_CHECKING:
    from vdnn.policies import Options

__all__ = ["BUDGET", "choose_plan", "must_be_policy", "policy_options"]

# A policy's name may be this one, too: the planner's plan for a budget, or for the machine's memory.
BUDGET = "budget"


def choose_plan(
    trace: Trace, hardware: Hardware, policy: str, budget: int | str | None, options: dict[str, Any]
) -> Plan:
    """The plan that is asked for; without a policy and a budget, that of "vdnn-all".

    Raises:
        UsageError: an unknown policy or option, or both a policy and a budget.
        InfeasibleError: no plan fits the budget; names the least that does.
    """
    from dataclasses import replace

    from vdnn.planner import BUDGETED, budgeted_plan, plan_for_budget
    from vdnn.policies import decide
    from vdnn.units import parse_size

    chosen = policy_options(options)
    if policy == BUDGET:
        policy, budget = "", hardware.available_bytes if budget is None else budget
    if policy in BUDGETED:
        if budget is not None:
            chosen = replace(chosen, budget_bytes=parse_size(budget))
        return budgeted_plan(policy, trace, hardware, chosen)
    if budget is None:
        return decide(policy or "vdnn-all", trace, hardware, chosen)
    if policy:
        raise UsageError(f"both the policy {policy} and a budget are given: a plan is made by one of them")
    return plan_for_budget(trace, hardware, parse_size(budget), chosen)


def policy_options(given: dict[str, Any]) -> Options:
    """The options of a policy, checked.

    Raises:
        UsageError: an unknown one (with the nearest), or one that cannot be.
    """
    from vdnn.policies import Options

    for name in given:
        if name not in Options.__slots__:
            raise unknown_name("option of a policy", name, Options.__slots__)
    chosen = Options(**given)
    chosen.check()
    return chosen


def must_be_policy(name: str) -> None:
    """Check a policy's name, before anything expensive.

    Raises:
        UsageError: an unknown one (with the nearest).
    """
    from vdnn.policies import find

    if name != BUDGET:
        find(name)
