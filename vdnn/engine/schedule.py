"""A plan, laid out for look-up while the model runs.

Every module call that the plan knows has a table of slots by pack number; a slot says which entry the saved
tensor belongs to, what to check, and what happens at that pack and at that tensor's first unpack. A saved
tensor that stays and marks no point has no slot where no rule could take it: so a pack costs one look-up,
and a mismatch inside one call costs only that call.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vdnn.errors import EngineError, PlanMismatchError
from vdnn.values.plan import Copy, Encode, Keep, Offload, Plan, Point, Recompute, SavedName

__all__ = ["NOTHING", "CallSchedule", "Rule", "Schedule", "Slot"]


@dataclass(slots=True)
class Slot:
    """One pack of one module call: `entry` is its plan entry, or -1 for a tensor that only marks a point.

    `source_of` are the entries that are computed again from this tensor, `pooled_to` those that hold the indices of
    the pool that takes it, `input_of` is the block that runs again from it.
    """

    entry: int = -1
    name: SavedName | None = None
    dtype: torch.dtype | None = None
    action: Keep | Offload | Recompute | Encode | None = None
    source_of: list[int] = field(default_factory=list)
    pooled_to: list[int] = field(default_factory=list)
    input_of: str = ""
    release: list[int] = field(default_factory=list)
    prefetch: list[int] = field(default_factory=list)
    arrive: list[int] = field(default_factory=list)

    @property
    def marks(self) -> bool:
        """Whether anything happens when this tensor is packed or asked for."""
        return bool(self.release or self.prefetch or self.arrive)

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is the planned one, as far as can be seen."""
        name = self.name
        return name is None or (
            self.dtype is tensor.dtype and name.nbytes == tensor.nbytes and name.rank == tensor.dim()
        )

    def mismatch(self, tensor: torch.Tensor) -> str:
        """How the tensor differs from the planned one."""
        name = self.name
        assert name is not None
        return (
            f"{name} was planned as {name.dtype} of rank {name.rank} and {name.nbytes} bytes, but is "
            f"{str(tensor.dtype).removeprefix('torch.')} of rank {tensor.dim()} and {tensor.nbytes} bytes"
        )


@dataclass(slots=True)
class CallSchedule:
    """One module call: its slots by pack number, and the entries released when it returns.

    `links` are the entries that this call helps to compute again, and whether it is the last to do so. `block` is the
    call's own name, if the plan runs it again; `holds` says that its input stays for that.
    """

    slots: dict[int, Slot] = field(default_factory=dict)
    release: list[int] = field(default_factory=list)
    links: list[tuple[int, bool]] = field(default_factory=list)
    block: str = ""
    holds: bool = False


NOTHING = CallSchedule()  # of a call that the plan does not know


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

    `idle` says that nothing can move, so that the engine need not look at the step at all.

    Raises:
        PlanMismatchError: a point of the plan names nothing that can be observed.
        EngineError: the plan computes feature maps again and does not say by which modules, or copies tensor by tensor.
    """

    def __init__(self, plan: Plan | None, rule: Rule | None = None) -> None:
        if rule is None:
            rule = Rule(offload=False)
            if plan is not None and plan.default == "offload":
                rule = Rule(min_bytes=plan.min_bytes, max_inflight_bytes=plan.max_inflight_bytes)
        self.plan = plan
        self.rule = rule
        self.calls: dict[tuple[str, int], CallSchedule] = {}
        self.modules = {name.module for entry in plan.entries for name in entry.saved} if plan else set()
        actions = [entry.action for entry in plan.entries] if plan else []
        if any(isinstance(action, Recompute) and not (action.through or action.block) for action in actions):
            assert plan is not None
            raise EngineError(
                f"the plan of {plan.policy} computes feature maps again that no module alone makes, which only the "
                "simulator does: use the policy checkpoint or checkpoint-offload, which recompute by block"
            )
        if any(isinstance(action, Copy) for action in actions):
            assert plan is not None
            raise EngineError(
                f"the plan of {plan.policy} copies saved tensor by saved tensor as {plan.policy} does, which only the "
                "simulator does: use vdnn-all, or run that library itself"
            )
        self.idle = not rule.offload and all(isinstance(action, Keep) for action in actions)
        # Bytes that each entry takes on the host, in blocks: one for the storage, or one for each of its views.
        self.host_sizes = {
            index: tuple(name.nbytes for name in entry.saved)
            if isinstance(entry.action, Offload) and not entry.action.whole
            else (entry.moved_bytes,)
            for index, entry in enumerate(plan.entries if plan else ())
            if entry.moved_bytes and isinstance(entry.action, Offload | Encode)
        }
        self.host_blocks = sum(map(len, self.host_sizes.values()))
        if plan is None:
            return
        for index, entry in enumerate(plan.entries):
            assert not isinstance(entry.action, Copy)  # refused above
            for name in entry.saved:
                slot = self._slot(name.module, name.call, name.index)
                slot.entry, slot.name, slot.action = index, name, entry.action
                slot.dtype = getattr(torch, name.dtype, None)
        for index, action in enumerate(actions):
            if isinstance(action, Offload):
                self._lay_out(index, action)
            elif isinstance(action, Recompute):
                self._lay_out_again(index, action)
            elif isinstance(action, Encode):
                self._lay_out_code(index, action, plan.entries[index].saved[0])
        if not rule.offload:
            for call in self.calls.values():
                call.slots = {
                    n: s
                    for n, s in call.slots.items()
                    if s.marks or s.source_of or s.pooled_to or s.input_of or not isinstance(s.action, Keep)
                }

    def _lay_out_code(self, index: int, action: Encode, name: SavedName) -> None:
        if action.how.startswith("index") and name.index > 0:
            # a pool saves its input right before its indices
            self._slot(name.module, name.call, name.index - 1).pooled_to.append(index)
        if action.release_at:
            self._lay_out(index, action)

    def _lay_out(self, index: int, action: Offload | Encode) -> None:
        point = Point.parse(action.release_at)
        self.modules.add(point.module)
        if point.kind == "end":
            self.calls.setdefault((point.module, point.call), CallSchedule()).release.append(index)
        else:
            self._slot(point.module, point.call, point.index).release.append(index)
        if action.prefetch_at:
            self._at_unpack(action.prefetch_at).prefetch.append(index)
        if action.wait_at:
            self._at_unpack(action.wait_at).arrive.append(index)

    def _lay_out_again(self, index: int, action: Recompute) -> None:
        if action.block:
            call = Point.parse(f"end {action.block}")
            self.modules.add(call.module)
            here = self.calls.setdefault((call.module, call.call), CallSchedule())
            here.block, here.holds = action.block, not action.source
            if here.holds:
                return
        source = Point.parse(f"pack {action.source}")
        slot = self._slot(source.module, source.call, source.index)
        if action.block:
            slot.input_of = action.block
            return
        slot.source_of.append(index)
        for place, text in enumerate(action.through):
            call = Point.parse(f"end {text}")
            self.modules.add(call.module)
            last = place == len(action.through) - 1
            self.calls.setdefault((call.module, call.call), CallSchedule()).links.append((index, last))

    def _slot(self, module: str, call: int, index: int) -> Slot:
        return self.calls.setdefault((module, call), CallSchedule()).slots.setdefault(index, Slot())

    def _at_unpack(self, text: str) -> Slot:
        point = Point.parse(text)
        if point.kind != "unpack":
            raise PlanMismatchError(f"{text!r} is not a moment of backward: the plan is damaged, make it again")
        self.modules.add(point.module)
        return self._slot(point.module, point.call, point.index)

    def check_names(self, known: set[str]) -> None:
        """Compare the plan's modules with the model's.

        Raises:
            PlanMismatchError: the plan names a module that the model does not have.
        """
        for module in sorted(self.modules):
            if module not in known and not module.startswith("<"):
                model = self.plan.model if self.plan else ""
                raise PlanMismatchError(
                    f"the plan was made for {model or 'another model'}: it names module {module!r}, which this "
                    "model does not have; capture this model and plan again"
                )
