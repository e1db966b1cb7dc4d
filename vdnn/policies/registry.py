"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from vdnn.analysis.torch7 import under
from vdnn.errors import UsageError, unknown_name
from vdnn.policies.algorithms import with_algorithms
from vdnn.policies.options import Options
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Plan
from vdnn.values.trace import Trace

__all__ = ["Policy", "decide", "distinct", "find", "model_options", "must_run", "names", "register", "summary"]

Policy = Callable[[Trace, Hardware, Options], Plan]
_POLICIES: dict[str, Policy] = {}
_MODEL_OPTIONS: dict[str, dict[str, str]] = {}
_NOT_OURS: set[str] = set()


def register(name: str, engine: bool = True, **model_options: str) -> Callable[[Policy], Policy]:
    """Make a policy known by a name, with the model options that its step must be captured with.

    `engine` False says that it is another library's way, which is simulated and never run.
    """

    def add(policy: Policy) -> Policy:
        _POLICIES[name] = policy
        _MODEL_OPTIONS[name] = model_options
        if not engine:
            _NOT_OURS.add(name)
        return policy

    return add


def must_run(name: str) -> None:
    """Check that the engine can be asked for a policy.

    Raises:
        UsageError: no such policy, or one that is only simulated.
    """
    find(name)
    if name in _NOT_OURS:
        raise UsageError(
            f"policy {name} is another library's way to offload, which vdnn only simulates: compare with it by "
            f"`vdnn compare MODEL --gpu ID --policy vdnn-all --policy {name}`, or run that library itself"
        )


def model_options(name: str) -> dict[str, str]:
    """The options that a model must be loaded with for a policy; none for most.

    Raises:
        UsageError: no such policy.
    """
    find(name)
    return dict(_MODEL_OPTIONS[name])


def distinct(names: Iterable[str], options: Options) -> list[str]:
    """Without the -m and -p forms where no table of algorithms tells them apart."""
    return [name for name in names if options.table is not None or not name.endswith(("-m", "-p"))]


def names() -> tuple[str, ...]:
    """The policies there are."""
    return tuple(sorted(_POLICIES))


def summary(name: str) -> str:
    """What a policy does, in a sentence: the first line of its docstring.

    Raises:
        UsageError: no such policy.
    """
    return (find(name).__doc__ or "").partition("\n")[0]


def find(name: str) -> Policy:
    """A policy by name.

    Raises:
        UsageError: no such policy; names the nearest.
    """
    if name not in _POLICIES:
        raise unknown_name("policy", name, _POLICIES)
    return _POLICIES[name]


def decide(name: str, trace: Trace, hardware: Hardware, options: Options | None = None) -> Plan:
    """The plan of a policy, checked. Where there is a table of algorithms, no suffix means the fastest, as -p does.

    Raises:
        UsageError: no such policy, or an option that cannot be.
    """
    policy = find(name)
    options = options or Options()
    options.check()
    if options.regime == "paper":
        options = replace(options, rules="paper", min_bytes=0)
    step = under(options.regime, trace, name)
    plan = policy(step, hardware, options)
    if options.table is not None and not plan.algorithm_table:
        plan = with_algorithms(plan, plan.policy, step, hardware, options, "fastest")
    plan.check()
    return plan
