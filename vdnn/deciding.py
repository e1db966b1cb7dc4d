"""What `wrap` decides: a plan at the first training call of each input shape, from the real inputs.

    a plan given        that plan, always
    a policy given      what the policy says of the step that is captured
    a budget            the plan that fits into it and takes the least time: nothing moves if the step fits; else
                        decided by storage, or the repeated blocks recomputed with or without offload
    neither             the same, with the memory there is

For another shape the latest plan is scaled to it, if it then fits and fills the budget; else one is made anew.
A loss outside the model is taken for a cross entropy of the outputs; what it saves stays where it is. A model that
cannot be captured is offloaded by rule.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from vdnn.checkpointing import blocks_of, checkpoint_blocks
from vdnn.engine import CudaDevice, Device, Rule, Schedule, VirtualDevice, choose_in_cudnn, what_cudnn_does
from vdnn.errors import CaptureError, EngineError, InfeasibleError, PlanMismatchError, UsageError, unknown_name
from vdnn.measuring.recognition import available_bytes, recognised
from vdnn.planner import BUDGETED, budgeted_plan, plan_for_budget, scaled_plan
from vdnn.policies import Options, decide, recomputed_blocks, remarks
from vdnn.sim import simulate_step
from vdnn.tracing import OPTIMIZERS, capture_model, likely_loss
from vdnn.units import format_bytes
from vdnn.values import Hardware, Keep, Plan, Trace, hardware

__all__ = ["Decider", "give_cudnn_back", "keep_blocks", "machine_of", "recompute_blocks", "rule_for"]

log = logging.getLogger("vdnn")

# What undoes the checkpointing of a wrapped model.
_UNDO: weakref.WeakKeyDictionary[nn.Module, Callable[[], None]] = weakref.WeakKeyDictionary()

# What sets cuDNN back after plans for a wrapped model.
_CUDNN: weakref.WeakKeyDictionary[nn.Module, Callable[[], None]] = weakref.WeakKeyDictionary()

# Of a real device's memory, what the allocator's rounding and fragmentation and other libraries may take.
_HEADROOM = 20
# A scaled plan must use so much of the budget, or another that moves less is looked for.
_FULL = 85


@dataclass(frozen=True, slots=True)
class _Decision:
    """A schedule, and whether the repeated blocks are recomputed under it; None: as the model is."""

    schedule: Schedule
    recompute: bool | None = None


class Decider:
    """Makes schedules for the passes of one model, and remembers them by what decides a step."""

    def __init__(
        self,
        device: Device,
        machine: Hardware,
        *,
        fixed: Plan | None,
        policy: str,
        budget_bytes: int | None,
        optimizer: str,
        options: Options,
    ) -> None:
        if optimizer not in OPTIMIZERS:
            raise unknown_name("optimizer", optimizer, OPTIMIZERS)
        self.device = device
        self.machine = machine
        self.policy = policy
        self.budget_bytes = budget_bytes
        self.optimizer = optimizer
        self.options = options
        self.kind = "cuda" if isinstance(device, CudaDevice) else "cpu"
        if fixed is not None:
            fixed.check()  # one from a file was; one that was made by hand may say what cannot be done
        self._fixed = None if fixed is None else Schedule(fixed)
        self._made: dict[Any, _Decision] = {}
        self._latest: Plan | None = None  # for a budget, of the step as it is: to be scaled to other shapes
        if fixed is not None:
            _say(fixed)

    def schedule(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Schedule:
        """The schedule for a call with these inputs.

        Raises:
            InfeasibleError: no plan fits the budget that was given.
        """
        if self._fixed is not None:
            if self._fixed.plan is not None:
                self._with_cudnn(model, self._fixed.plan)
            return self._fixed
        key = self._key(model, args, kwargs)
        found = self._made.get(key)
        if found is None:
            if self._free:
                keep_blocks(model)  # the step is captured as the model itself runs it
            found = self._made[key] = self._make(model, args, kwargs)
        if found.recompute is not None and found.recompute != (model in _UNDO):
            recompute_blocks(model) if found.recompute else keep_blocks(model)
        return found.schedule

    @property
    def _free(self) -> bool:
        """Whether it is the decider's to say what is recomputed."""
        return not self.policy

    def _key(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        shapes = [
            (leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad)
            if isinstance(leaf, torch.Tensor)
            else repr(leaf)
            for leaf in tree_leaves((args, kwargs))
        ]
        trained = [parameter.requires_grad for parameter in model.parameters()]
        return (*shapes, *trained, model.training, self._precision())

    def _precision(self) -> str:
        if not torch.is_autocast_enabled(self.kind):
            return "fp32"
        return "amp-bf16" if torch.get_autocast_dtype(self.kind) is torch.bfloat16 else "amp"

    def _make(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Decision:
        try:
            trace = self._capture(model, args, kwargs)
        except (CaptureError, UsageError) as error:  # the latter: nothing in the output can be trained
            log.warning("vdnn: %s; offloading by rule instead", error)
            return _Decision(Schedule(None, rule_for(self.policy or "vdnn-all", self.options)))
        recompute = None
        if self.policy in BUDGETED:
            options = replace(self.options, budget_bytes=self._there())
            plan = budgeted_plan(self.policy, trace, self.machine, options)
        elif self.policy:
            plan = decide(self.policy, trace, self.machine, self.options)
        else:
            plan, recompute = self._least_time(trace, lambda: self._recomputing(model, args, kwargs, trace))
        if not recompute:
            plan = replace(plan, notes=(*plan.notes, *remarks(trace, plan)))
        if plan.offloaded_bytes and _runs_compiled(model):
            log.warning(
                "vdnn: %s runs as compiled code, which saves tensors of its own that no plan names: it is offloaded by "
                "rule instead of by the plan of %s",
                trace.model,
                plan.policy,
            )
            return _Decision(Schedule(None, rule_for(plan.policy, self.options)), recompute)
        plan = self._with_cudnn(model, plan)
        _say(plan)
        return _Decision(Schedule(plan), recompute)

    def _capture(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
        with _disable_current_modes():  # its fakes are no memory of the step that is under way
            return capture_model(
                model,
                args,
                kwargs,
                loss=likely_loss,
                precision=self._precision(),
                optimizer=self.optimizer,
                device=self.kind,
                name=type(model).__name__,
                batch=next((int(x.shape[0]) for x in tree_leaves((args, kwargs)) if getattr(x, "ndim", 0)), 0),
            )

    def _recomputing(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], trace: Trace
    ) -> Trace | None:
        """The same step with the repeated blocks recomputed; None where there are none, or the model does so itself."""
        if not blocks_of(model) or recomputed_blocks(trace):
            return None
        recompute_blocks(model)
        try:
            return self._capture(model, args, kwargs)
        except (CaptureError, EngineError) as error:
            log.info("vdnn: recomputing the blocks of %s was not considered: %s", trace.model, error)
            return None
        finally:
            keep_blocks(model)

    def _with_cudnn(self, model: nn.Module, plan: Plan) -> Plan:
        """Set cuDNN as the plan wants it, where there is one, and note what became of its algorithms."""
        if not isinstance(self.device, CudaDevice) or not plan.workspace:
            return plan
        undo = choose_in_cudnn(plan)
        _CUDNN.setdefault(model, undo)  # the first one knows how it was before
        return replace(plan, notes=(*plan.notes, what_cudnn_does(plan)))

    def _there(self) -> int:
        """Device memory for a step."""
        if self.options.budget_bytes is not None:
            return self.options.budget_bytes
        if isinstance(self.device, CudaDevice):
            return available_bytes(self.device.torch_device.index) * (100 - _HEADROOM) // 100
        return self.machine.available_bytes

    def _least_time(self, trace: Trace, recomputing: Callable[[], Trace | None]) -> tuple[Plan, bool]:
        """The plan for the budget or the memory there is, and whether it is one for recomputed blocks."""
        there = self._there() if self.budget_bytes is None else self.budget_bytes
        impossible: InfeasibleError | None = None
        kept = self._scaled(trace, there)
        if kept is not None:
            return kept, False
        try:
            kept = plan_for_budget(trace, self.machine, there, self.options)
            if all(isinstance(entry.action, Keep) for entry in kept.entries):
                return kept, False
        except InfeasibleError as error:
            impossible = error
        other = recomputing()
        try:
            again = plan_for_budget(other, self.machine, there, self.options) if other is not None else None
        except InfeasibleError:
            again = None
        if again is not None and other is not None:
            ours = simulate_step(other, again, self.machine).iteration_time_ns or 0
            if kept is None:
                return _named(other, again, "nothing else fits"), True
            theirs = simulate_step(trace, kept, self.machine).iteration_time_ns or 0
            if ours < theirs:
                return _named(
                    other, again, f"deciding by storage would take {theirs / max(ours, 1):.2f} times the time"
                ), True
        if kept is not None:
            self._latest = kept
            return kept, False
        if self.budget_bytes is not None and impossible is not None:
            raise impossible
        log.warning("vdnn: %s; going on with the plan that needs the least memory", impossible)
        if other is not None:
            return _named(other, _least(other, self.machine, self.options), "nothing fits"), True
        return _least(trace, self.machine, self.options), False

    def _scaled(self, trace: Trace, there: int) -> Plan | None:
        """The latest plan with this step's sizes, if it fits and does not move much more than it must."""
        if self._latest is None or simulate_step(trace, None, self.machine, memory_limit=there).fits:
            return None
        try:
            plan = scaled_plan(self._latest, trace)
        except PlanMismatchError:
            return None
        result = simulate_step(trace, plan, self.machine, memory_limit=there)
        peak = result.peak_reserved_bytes or result.peak_requested_bytes or 0
        return plan if result.fits and 100 * peak >= _FULL * there else None


def _runs_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has the model, or a part of it, in the call that is under way."""
    from torch._dynamo import OptimizedModule

    if any(isinstance(part, OptimizedModule) or getattr(part, "_compiled_call_impl", None) for part in model.modules()):
        return True
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, OptimizedModule) and caller._orig_mod is model:
            return True
        frame = frame.f_back
    return False


def _say(plan: Plan) -> None:
    """One line on what was decided."""
    moved = sum(entry.moved_bytes > 0 for entry in plan.entries)
    what = (
        f"offload is active: {moved} of {len(plan.entries)} saved storages, {format_bytes(plan.offloaded_bytes)}"
        if moved
        else "nothing is offloaded"
    )
    log.info("vdnn: %s, policy %s: %s", plan.model, plan.policy, "; ".join((what, *plan.notes)))


def _least(trace: Trace, machine: Hardware, options: Options) -> Plan:
    """The plan that needs the least memory: everything goes, and nothing comes back before it must."""
    return decide("vdnn-all", trace, machine, replace(options, window_bytes=0, max_inflight_bytes=0, keep_soon=False))


def _named(trace: Trace, plan: Plan, why: str) -> Plan:
    """A plan for recomputed blocks by its policy's name, with the reason."""
    name = "checkpoint-offload" if plan.offloaded_bytes else "checkpoint"
    return replace(plan, policy=name, notes=(f"recomputes {len(recomputed_blocks(trace))} blocks: {why}", *plan.notes))


def recompute_blocks(model: nn.Module, patterns: Sequence[str] = ()) -> None:
    """Checkpoint a wrapped model's blocks until `keep_blocks`.

    Raises:
        UsageError: no repeated blocks, or no module of such a name.
    """
    _UNDO[model] = checkpoint_blocks(model, patterns)


def give_cudnn_back(model: nn.Module) -> None:
    """Set cuDNN back to how it was before a plan for this model, if one set it."""
    undo = _CUDNN.pop(model, None)
    if undo is not None:
        undo()


def keep_blocks(model: nn.Module) -> None:
    """Undo `recompute_blocks`, if it was done."""
    undo = _UNDO.pop(model, None)
    if undo is not None:
        undo()


def machine_of(device: Device) -> Hardware:
    """The machine that a device is, as the simulator knows machines.

    A virtual device is an RTX 4090 with its own memory and link; a GPU without a preset is taken for one, too.
    """
    rates = hardware("rtx4090")
    if isinstance(device, VirtualDevice):
        both = (rates.duplex_bytes_per_s * (device.d2h_bytes_per_s + device.h2d_bytes_per_s)) // (
            rates.d2h_bytes_per_s + rates.h2d_bytes_per_s
        )
        return replace(
            rates,
            memory_bytes=device.memory_bytes or rates.available_bytes,
            context_bytes=0,  # a virtual device has no CUDA beside
            cudnn_bytes=0,
            d2h_bytes_per_s=device.d2h_bytes_per_s,
            h2d_bytes_per_s=device.h2d_bytes_per_s,
            duplex_bytes_per_s=both,
        )
    if isinstance(device, CudaDevice):
        memory = torch.cuda.get_device_properties(device.torch_device).total_memory
        found = recognised(device.name, memory)
        if found is not None:
            return found
        log.warning("vdnn: no preset for %s: planning with the rates of an RTX 4090 (give hardware=…)", device.name)
        return replace(rates, memory_bytes=memory)
    return rates


def rule_for(policy: str, options: Options) -> Rule:
    """What the engine does where there is no plan."""
    if policy in ("none", "none-m", "none-p"):
        return Rule(offload=False)
    types = (_ConvNd,) if policy.startswith("vdnn-conv") else ()
    rule = Rule(min_bytes=options.min_bytes, types=types)
    bound = options.max_inflight_bytes
    return rule if bound is None else replace(rule, max_inflight_bytes=bound)
