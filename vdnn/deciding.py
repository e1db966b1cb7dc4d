"""What `wrap` decides: a plan at the first training call of each input shape, from the real inputs.

    a plan given        that plan, always
    a policy given      what the policy says of the step that is captured
    a budget            the plan that fits into it and takes the least time
    neither             the same, with the memory there is: nothing moves if the step fits

The loss is taken for a sum of the outputs: what a loss outside the model saves stays where it is. A model that
cannot be captured is offloaded by rule.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from vdnn.checkpointing import checkpoint_blocks
from vdnn.engine import CudaDevice, Device, Rule, Schedule, VirtualDevice
from vdnn.errors import CaptureError, InfeasibleError, UsageError
from vdnn.measure import available_bytes, recognised
from vdnn.planner import plan_for_budget
from vdnn.policies import Options, decide
from vdnn.tracing import OPTIMIZERS, capture_model
from vdnn.units import format_bytes
from vdnn.values import Hardware, Plan, Trace, hardware

__all__ = ["Decider", "keep_blocks", "machine_of", "recompute_blocks", "rule_for"]

log = logging.getLogger("vdnn")

# What undoes the checkpointing of a wrapped model.
_UNDO: weakref.WeakKeyDictionary[nn.Module, Callable[[], None]] = weakref.WeakKeyDictionary()

# Of a real device's memory, what the allocator's rounding and fragmentation and other libraries may take.
_HEADROOM = 20


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
            raise UsageError(
                f"optimizer is {optimizer!r}: it may be {', '.join(OPTIMIZERS)}, whose states are planned for"
            )
        self.device = device
        self.machine = machine
        self.policy = policy
        self.budget_bytes = budget_bytes
        self.optimizer = optimizer
        self.options = options
        self.kind = "cuda" if isinstance(device, CudaDevice) else "cpu"
        self._fixed = None if fixed is None else Schedule(fixed)
        self._made: dict[Any, Schedule] = {}

    def schedule(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Schedule:
        """The schedule for a call with these inputs.

        Raises:
            InfeasibleError: no plan fits the budget that was given.
        """
        if self._fixed is not None:
            return self._fixed
        key = self._key(model, args, kwargs)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = self._make(model, args, kwargs)
        return found

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

    def _make(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Schedule:
        name = type(model).__name__
        try:
            trace = capture_model(
                model,
                args,
                kwargs,
                precision=self._precision(),
                optimizer=self.optimizer,
                device=self.kind,
                name=name,
                batch=next((int(x.shape[0]) for x in tree_leaves((args, kwargs)) if getattr(x, "ndim", 0)), 0),
            )
        except CaptureError as error:
            log.warning("vdnn: %s; offloading by rule instead", error)
            return Schedule(None, rule_for(self.policy or "vdnn-all", self.options))
        plan = self._decide(trace)
        moved = sum(entry.action.action == "offload" for entry in plan.entries)
        if moved:
            log.info(
                "vdnn: %s, policy %s: offload is active: %d of %d saved storages, %s; %s",
                name, plan.policy, moved, len(plan.entries), format_bytes(plan.offloaded_bytes), "; ".join(plan.notes),
            )  # fmt: skip
        else:
            log.info("vdnn: %s, policy %s: nothing is offloaded; %s", name, plan.policy, "; ".join(plan.notes))
        return Schedule(plan)

    def _decide(self, trace: Trace) -> Plan:
        if self.policy:
            return decide(self.policy, trace, self.machine, self.options)
        if self.budget_bytes is not None:
            return plan_for_budget(trace, self.machine, self.budget_bytes, self.options)
        there = self.machine.memory_bytes
        if isinstance(self.device, CudaDevice):
            there = available_bytes(self.device.torch_device.index) * (100 - _HEADROOM) // 100
        try:
            return plan_for_budget(trace, self.machine, there, self.options)
        except InfeasibleError as error:
            log.warning("vdnn: %s; going on with the plan that needs the least memory", error)
            least = replace(self.options, window_bytes=0, max_inflight_bytes=0, keep_soon=False)
            return decide("vdnn-all", trace, self.machine, least)


def recompute_blocks(model: nn.Module, patterns: Sequence[str] = ()) -> None:
    """Checkpoint a wrapped model's blocks until `keep_blocks`.

    Raises:
        UsageError: no repeated blocks, or no module of such a name.
    """
    _UNDO[model] = checkpoint_blocks(model, patterns)


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
            memory_bytes=device.memory_bytes or rates.memory_bytes,
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
    if policy == "none":
        return Rule(offload=False)
    types = (_ConvNd,) if policy == "vdnn-conv" else ()
    return Rule(min_bytes=options.min_bytes, types=types)
