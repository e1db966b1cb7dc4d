"""A plan, laid out for look-up while the model runs.

Every module call that the plan knows has a list of slots, one a pack, in order; a slot says which entry the
saved tensor belongs to, what to check, and what happens at that pack and at that tensor's first unpack.
So a pack costs one look-up, and a mismatch inside one call costs only that call.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vdnn.errors import PlanMismatchError
from vdnn.values.plan import Offload, Plan, Point, SavedName

__all__ = ["CallSchedule", "Rule", "Schedule", "Slot"]


@dataclass(slots=True)
class Slot:
    """One pack of one module call: `entry` is its plan entry, or -1 for a tensor that only marks a point."""

    entry: int = -1
    name: SavedName | None = None
    release: list[int] = field(default_factory=list)
    prefetch: list[int] = field(default_factory=list)
    arrive: list[int] = field(default_factory=list)


@dataclass(slots=True)
class CallSchedule:
    """One module call: its slots by pack number, and the entries released when it returns."""

    slots: dict[int, Slot] = field(default_factory=dict)
    release: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Rule:
    """What to do with saved tensors that no plan knows.

    Offload those of at least `min_bytes` (packed in a module of one of `types`, if given), release the oldest
    once more than `max_inflight_bytes` are on their way, and fetch `ahead_bytes` ahead in backward.
    """

    offload: bool = True
    min_bytes: int = 1 << 20
    max_inflight_bytes: int = 1 << 30
    ahead_bytes: int = 1 << 29
    types: tuple[type, ...] = ()


class Schedule:
    """A plan and the rule for what it does not know (without one: the plan's own default).

    Raises:
        PlanMismatchError: a point of the plan names nothing that can be observed.
    """

    def __init__(self, plan: Plan | None, rule: Rule | None = None) -> None:
        if rule is None:
            rule = Rule(offload=False)
            if plan is not None and plan.default == "offload":
                rule = Rule(min_bytes=plan.min_bytes, max_inflight_bytes=plan.max_inflight_bytes)
        self.plan = plan
        self.rule = rule
        self.calls: dict[tuple[str, int], CallSchedule] = {}
        self.actions = [entry.action for entry in plan.entries] if plan else []
        if plan is None:
            return
        for index, entry in enumerate(plan.entries):
            for name in entry.saved:
                slot = self._slot(name.module, name.call, name.index)
                slot.entry, slot.name = index, name
        for index, action in enumerate(self.actions):
            if isinstance(action, Offload):
                point = Point.parse(action.release_at)
                if point.kind == "end":
                    self._call(point).release.append(index)
                else:
                    self._slot(point.module, point.call, point.index).release.append(index)
                if action.prefetch_at:
                    self._at_unpack(action.prefetch_at).prefetch.append(index)
                if action.wait_at:
                    self._at_unpack(action.wait_at).arrive.append(index)

    def _call(self, point: Point) -> CallSchedule:
        return self.calls.setdefault((point.module, point.call), CallSchedule())

    def _slot(self, module: str, call: int, index: int) -> Slot:
        return self.calls.setdefault((module, call), CallSchedule()).slots.setdefault(index, Slot())

    def _at_unpack(self, text: str) -> Slot:
        point = Point.parse(text)
        if point.kind != "unpack":
            raise PlanMismatchError(f"{text!r} is not a moment of backward: the plan is damaged, make it again")
        return self._slot(point.module, point.call, point.index)

    def check_names(self, known: set[str]) -> None:
        """Compare the plan's modules with the model's.

        Raises:
            PlanMismatchError: the plan names a module that the model does not have.
        """
        for (module, _), _call in self.calls.items():
            if module not in known and not module.startswith("<"):
                model = self.plan.model if self.plan else ""
                raise PlanMismatchError(
                    f"the plan was made for {model or 'another model'}: it names module {module!r}, which this "
                    "model does not have; capture this model and plan again"
                )
