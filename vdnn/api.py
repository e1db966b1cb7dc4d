"""The library's public functions. Each imports what it needs when it is called: `import vdnn` loads no torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdnn.choosing import BUDGET, choose_plan, policy_options
from vdnn.errors import PlanMismatchError, UsageError, unknown_name
from vdnn.values import ALONE, Hardware, Node, Plan, Recipe, RunResult, Trace
from vdnn.values import hardware as named_hardware

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vdnn.analysis.torch7 import Regime
    from vdnn.engine import Device, EngineReport, Offloader
    from vdnn.models import Work
    from vdnn.tracker import Tracker
    from vdnn.training import Run

__all__ = ["capture", "load", "max_batch", "offload", "plan", "report", "run", "simulate", "track", "unwrap", "wrap"]

log = logging.getLogger("vdnn")

# Options of `capture`, beside the parts of a recipe; the last four are of a model that is given itself.
_CAPTURED = ("precision", "optimizer", "channels_last", "device", "recipe", "kwargs", "targets", "name", "options")


def load(name: str, batch: int | str = 32, **options: object) -> Work:
    """A model with a batch of inputs and a loss, by name: "torchvision:resnet50", "hf:gpt2", "file.py:factory".

    Raises:
        UsageError: an unknown name or option (with the nearest), or a batch that is none.
    """
    from vdnn.models import load as load_work

    return load_work(name, batch, **options)


def capture(work: Work | nn.Module, *inputs: Any, loss: Any = None, **options: Any) -> Trace:
    """One training step as a trace, without a GPU: `capture(work, …)` or `capture(model, *inputs, loss=…)`.

    Options: precision ("fp32", "amp", "amp-bf16", "bf16"), optimizer ("none", "sgd", "sgd-nesterov", "adamw"),
    channels_last, device ("cuda", or "cpu" for runs on a virtual device), and those of `vdnn.values.Recipe`:
    step ("training", "inference"), attention ("fused", "math"), zero_grad ("to-none", "in-place"),
    optimizer_impl ("foreach", "for-loop", "fused"), backward_autocast and cudnn_benchmark (False, True).

    Raises:
        UsageError: an unknown option or value.
        CaptureError: the step cannot be captured; names the op and the module.
    """
    from vdnn.models import Work as WorkType
    from vdnn.tracing import capture_model, capture_work

    parts = [name for name in Recipe.__slots__ if name in options]
    if parts and "recipe" in options:
        raise UsageError(f"a recipe and its part {parts[0]} are both given: put it into the recipe")
    options.setdefault("recipe", Recipe.of({name: options.pop(name) for name in parts}))
    for name in options:
        if name not in _CAPTURED:
            raise unknown_name("option of a capture", name, (*_CAPTURED, *Recipe.__slots__))
    if isinstance(work, WorkType):
        if inputs or loss is not None:
            raise UsageError("a loaded work has its own inputs and loss: give either a work, or a model with inputs")
        return capture_work(work, **options)
    batch = next((int(x.shape[0]) for x in inputs if getattr(x, "ndim", 0)), 0)
    return capture_model(work, inputs, loss=loss, batch=batch, **options)


def plan(
    trace: Trace,
    hardware: str | Path | Hardware = "rtx4090",
    policy: str = "",
    *,
    budget: int | str | None = None,
    node: Node | None = None,
    **options: Any,
) -> Plan:
    """What a policy (default: "vdnn-all") decides for every saved storage of a trace, or what fits a budget.

    Args:
        policy: a policy's name, or "budget": the planner's plan, for the machine's memory if no budget is given.
        budget: device memory for the step, "12GiB" or bytes: the plan that fits and takes the least time.
        node: several GPUs that train together: with each one's share of the link, and DDP's buckets in its memory.
        options: rules ("event" or "paper"), min_bytes, max_inflight_bytes, window_bytes, keep_soon,
            regime ("pytorch" or "paper"), algorithms (a table), budget_bytes (of vdnn-dyn).

    Raises:
        UsageError: an unknown policy, machine or option, or both a policy and a budget.
        InfeasibleError: no plan fits the budget; names the least that does.
    """
    if node is None:
        return choose_plan(trace, named_hardware(hardware), policy, budget, options)
    from dataclasses import replace

    from vdnn.analysis.dataparallel import data_parallel
    from vdnn.sim.allreduce import share_of

    node.check()
    step, _ = data_parallel(trace, node)
    made = choose_plan(step, share_of(named_hardware(hardware), node), policy, budget, options)
    return replace(made, trace=trace.fingerprint())


def simulate(
    trace: Trace,
    plan: Plan | None = None,
    hardware: str | Path | Hardware = "rtx4090",
    *,
    memory_limit: int | None = None,
    timeline: bool = False,
    regime: Regime = "pytorch",
    node: Node = ALONE,
) -> RunResult:
    """The numbers of one step on a machine that need not be there; without a plan: no offload.

    Args:
        node: `vdnn.values.Node(gpus=8, gpus_per_link=4, host_bytes=…)`: the step of one of several GPUs that train
            together under DDP; the plan had better be made with it, too.
        regime: "paper" for the step and the memory of the vDNN paper (Torch7, one pool); the plan must be made so too.

    Raises:
        PlanMismatchError: the plan was not made from this trace.
        FormatError: the plan says what cannot be done; one from a file was checked when it was read.
    """
    from vdnn.sim import simulate_step

    if plan is not None:
        plan.check()
    return simulate_step(
        trace,
        plan,
        named_hardware(hardware),
        memory_limit=memory_limit,
        timeline=timeline,
        regime=regime,
        node=node,
    )


def max_batch(
    model: str,
    hardware: str | Path | Hardware = "rtx4090",
    policy: str = "none",
    *,
    memory: int | str | None = None,
    precision: str = "fp32",
    optimizer: str = "sgd",
    limit: int = 1 << 16,
    model_options: Mapping[str, object] | None = None,
    traces: dict[Any, Trace] | None = None,
    cached: bool = False,
    start: int = 0,
    **options: Any,
) -> tuple[RunResult, RunResult | None]:
    """The largest batch of a model that fits on a GPU under a policy: the results there, and at the next that does not.

    A batch for which a policy finds no plan does not fit, and has no result.

    Args:
        policy: a policy's name, or "budget": what the planner makes fit.
        memory: device memory, "12GiB" or bytes, instead of the GPU's.
        limit: no larger batch is tried; the second result is None if that one fits, or the next one has no plan.
        model_options: of the model, such as {"image_size": 288}.
        traces: captures by step, filled here: give the same to several calls.
        cached: look for captures on disk, too, and keep new ones there (vdnn.trace_cache).
        start: a batch that should fit, if one is known, such as what fits under a policy that moves less.
        options: of the policy.

    Raises:
        UsageError: an unknown name or option.
        InfeasibleError: a batch of 1 does not fit.
    """
    from vdnn.batches import Asked, max_batch_of
    from vdnn.policies import model_options as options_of
    from vdnn.units import parse_size

    machine = named_hardware(hardware)
    asked = Asked(
        model,
        {**({} if policy == BUDGET else options_of(policy)), **(model_options or {})},
        machine,
        machine.available_bytes if memory is None else parse_size(memory),
        precision,
        optimizer,
        options,
        limit,
        {} if traces is None else traces,
        cached,
    )
    return max_batch_of(asked, policy, start)


def run(
    work: Work,
    policy: str = "",
    hardware: str | Path | Hardware = "rtx4090",
    *,
    plan: Plan | None = None,
    budget: int | str | None = None,
    device: str = "auto",
    steps: int = 5,
    precision: str = "fp32",
    optimizer: str = "sgd",
    seed: int = 0,
    **options: Any,
) -> Run:
    """Train some steps for real, with and without offload: prediction beside measurement, gradients compared.

    Args:
        hardware: the machine that is predicted; a virtual device has its memory and link.
        policy: default: "vdnn-all".
        plan: a plan to execute, instead of a policy. It must be made for the device that runs.
        budget: plan for this much device memory, instead of a policy.
        device: "virtual", "cuda", or "auto": CUDA where there is one.

    Raises:
        UsageError: an unknown name or option, or no CUDA device.
        PlanMismatchError: the plan was made for another model, batch or device.
        DeviceOutOfMemory: the virtual device's memory is spent.
    """
    from vdnn.models import checkpointed
    from vdnn.policies import model_options, must_run
    from vdnn.training import find_place, run_policies

    if policy:
        must_run(policy)
    place, machine = find_place(device), named_hardware(hardware)
    kind = "cuda" if place == "cuda" else "cpu"
    _must_be_for(kind, plan)
    trace = capture(work, precision=precision, optimizer=optimizer, device=kind)
    again, its_trace = work, trace
    if policy and "checkpoint" in model_options(policy) and "checkpoint" not in dict(work.options):
        again = checkpointed(work)
        its_trace = capture(again, precision=precision, optimizer=optimizer, device=kind)
    made = plan if plan is not None else choose_plan(its_trace, machine, policy, budget, options)
    simulate(its_trace, made, machine)  # refuses a plan that is not for this trace, before anything runs
    cases: list[tuple[Work, Trace, Plan | None]] = [(work, trace, None)]
    if made.policy != "none" or made.offloaded_bytes:
        cases.append((again, its_trace, made))
    return list(run_policies(cases, machine, place, steps=steps, seed=seed))[-1]


def wrap(
    model: nn.Module,
    policy: str = "",
    *,
    plan: Plan | str | Path | None = None,
    budget: int | str | None = None,
    device: Device | None = None,
    hardware: str | Path | Hardware | None = None,
    optimizer: str = "adamw",
    blocks: Sequence[str] = (),
    **options: Any,
) -> nn.Module:
    """Offload what autograd saves in the model's forward, in place; returns the model. `unwrap` undoes it.

    Alone it offloads no more than it takes for the step to fit into the device's memory: nothing, if it fits.
    The step is captured at the first training call of each input shape, from the real inputs, and planned from
    that (a loss outside the model is taken for a cross entropy of the outputs, and what it saves stays). A model that
    cannot be captured is offloaded by rule. One line in the log ("vdnn", level INFO) says what was decided.

    Args:
        policy: decide by this policy instead ("vdnn-all", "vdnn-conv", "none"; "checkpoint" and "checkpoint-offload"
            recompute the model's repeated blocks).
        plan: execute this plan instead, or that of this file.
        budget: device memory for the step, "12GiB" or bytes, instead of all there is; for vdnn-dyn and capuchin, too.
        device: default: the model's own. For a model on the CPU offload is inactive unless a virtual device is given.
        hardware: the machine to plan for; default: the device's.
        optimizer: whose states the step will have: "none", "sgd" or "adamw".
        blocks: of the checkpoint policies: names of the modules to recompute ("layers.*"), instead of those found.

    Raises:
        UsageError: an unknown policy, optimizer or option, more than one of policy, plan and budget, or no blocks.
        PlanMismatchError: the plan was made for another model.
        EngineError: the model is wrapped already.
        InfeasibleError: at the first training call: no plan fits the budget.
    """
    from dataclasses import replace

    from vdnn.deciding import Decider, machine_of, recompute_blocks
    from vdnn.engine import CudaDevice, Schedule, leave_model, wrap_model
    from vdnn.planner import BUDGETED
    from vdnn.policies import model_options, must_run
    from vdnn.units import parse_size
    from vdnn.values import load as load_value

    _must_be_device(device)
    if policy:
        must_run(policy)
    fixed: Plan | None = load_value(plan, "plan") if isinstance(plan, str | Path) else plan
    given = [name for name, value in (("policy", policy), ("plan", plan), ("budget", budget)) if value]
    if len(given) > 1 and (plan is not None or policy not in BUDGETED):
        raise UsageError(f"{' and '.join(given)} are both given: a model is wrapped by one of them, leave one out")
    recomputes = bool(policy) and "checkpoint" in model_options(policy)
    if fixed is not None:
        Schedule(fixed).check_names({fqn for fqn, _ in model.named_modules()})
    chosen = policy_options(options)
    budget_bytes = None if budget is None else parse_size(budget)
    place = next((p.device for p in (*model.parameters(), *model.buffers())), None)
    if device is None:
        if place is None or place.type != "cuda":
            log.warning("vdnn: the model is on the CPU: offload is inactive (name a virtual device to run it there)")
            leave_model(model)
            return model
        device = CudaDevice(place.index)
    kind = "cuda" if isinstance(device, CudaDevice) else "cpu"
    _must_be_for(kind, fixed)
    decider = Decider(
        device,
        named_hardware(hardware) if hardware is not None else machine_of(device),
        fixed=fixed,
        policy=policy,
        budget_bytes=budget_bytes,
        optimizer=optimizer,
        options=replace(chosen, budget_bytes=budget_bytes) if policy in BUDGETED else chosen,
    )
    wrap_model(model, device, decider.schedule)
    if recomputes:
        try:
            recompute_blocks(model, blocks)
        except UsageError:
            unwrap(model)
            raise
    return model


def _must_be_for(kind: str, plan: Plan | None) -> None:
    if plan is not None and plan.device != kind:
        here = "a virtual device's tensors are on the CPU, where" if kind == "cpu" else "on this CUDA device"
        raise PlanMismatchError(
            f"the plan is for the step of a {plan.device} device, and {here} other tensors are saved: capture the "
            f"model with device={kind!r} and plan again (`vdnn plan MODEL --device {kind} … -o FILE`)"
        )


def _must_be_device(device: object) -> None:
    if device is not None and not hasattr(device, "host_bytes"):
        way = "leave it out for the model's own, or give vdnn.VirtualDevice(…) or vdnn.CudaDevice(…)"
        raise UsageError(f"device is {device!r}: {way}")


def unwrap(model: nn.Module) -> nn.Module:
    """Undo `wrap`.

    Raises:
        EngineError: the model is not wrapped.
    """
    from vdnn.deciding import give_cudnn_back, keep_blocks
    from vdnn.engine import unwrap_model

    unwrap_model(model)
    give_cudnn_back(model)
    keep_blocks(model)
    return model


def report(model: nn.Module) -> EngineReport:
    """What the engine did to a wrapped model so far; prints as a table.

    Raises:
        EngineError: the model is not wrapped.
    """
    from vdnn.engine import report_of

    return report_of(model)


def offload(
    policy: str = "vdnn-all", *, device: Device | None = None, model: nn.Module | None = None, **options: Any
) -> AbstractContextManager[Offloader]:
    """Offload by rule whatever autograd saves inside a `with` block: a loop, a function, part of a model.

    Up to `max_inflight_bytes` (1 GiB) stay on the device while they are copied: less saved than that frees nothing.

    Raises:
        UsageError: an unknown policy, one that asks for modules, or no CUDA device and no virtual one given.
    """
    from vdnn.deciding import rule_for
    from vdnn.engine import CudaDevice, offloading
    from vdnn.policies import must_run

    must_run(policy)
    _must_be_device(device)
    if policy.startswith("vdnn-conv"):
        raise UsageError(f"{policy} goes by modules, a block of code has none: take vdnn-all, or wrap the model")
    return offloading(device or CudaDevice(), rule_for(policy, policy_options(options)), model)


def track(model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> Tracker:
    """A memory tracker of anything: `with vdnn.track(model) as tracker: …`, then `tracker.result()`."""
    from vdnn.tracker import track as tracker

    return tracker(model, optimizer, **options)
