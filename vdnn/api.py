"""The library's public functions. Each imports what it needs when it is called: `import vdnn` loads no torch."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdnn.errors import UsageError
from vdnn.values import Hardware, Plan, RunResult, Trace
from vdnn.values import hardware as named_hardware

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vdnn.engine import Device, EngineReport, Offloader
    from vdnn.models import Work
    from vdnn.tracker import Tracker
    from vdnn.training import Run

__all__ = ["capture", "load", "offload", "plan", "report", "run", "simulate", "track", "unwrap", "wrap"]

log = logging.getLogger("vdnn")


def load(name: str, batch: int | str = 32, **options: object) -> Work:
    """A model with a batch of inputs and a loss, by name: "torchvision:resnet50", "hf:gpt2", "file.py:factory".

    Raises:
        UsageError: an unknown name or option (with the nearest), or a batch that is none.
    """
    from vdnn.models import load as load_work

    return load_work(name, batch, **options)


def capture(work: Work | nn.Module, *inputs: Any, loss: Any = None, **options: Any) -> Trace:
    """One training step as a trace, without a GPU: `capture(work, …)` or `capture(model, *inputs, loss=…)`.

    Options: precision ("fp32", "amp", "amp-bf16", "bf16"), optimizer ("none", "sgd", "adamw"), channels_last,
    device ("cuda", or "cpu" for runs on a virtual device).

    Raises:
        UsageError: an unknown option value.
        CaptureError: the step cannot be captured; names the op and the module.
    """
    from vdnn.models import Work as WorkType
    from vdnn.tracing import capture_model, capture_work

    if isinstance(work, WorkType):
        if inputs or loss is not None:
            raise UsageError("a loaded work has its own inputs and loss: give either a work, or a model with inputs")
        return capture_work(work, **options)
    batch = next((int(x.shape[0]) for x in inputs if getattr(x, "ndim", 0)), 0)
    return capture_model(work, inputs, loss=loss, batch=batch, **options)


def plan(trace: Trace, hardware: str | Path | Hardware = "rtx4090", policy: str = "vdnn-all", **options: Any) -> Plan:
    """What a policy decides for every saved storage of a trace on a machine.

    Options: rules ("event" or "paper"), min_bytes, max_inflight_bytes, window_bytes, keep_soon.

    Raises:
        UsageError: an unknown policy, machine or option.
    """
    return _decide(trace, named_hardware(hardware), policy, options)


def _decide(trace: Trace, hardware: Hardware, policy: str, options: dict[str, Any]) -> Plan:
    from vdnn.policies import Options, decide

    try:
        chosen = Options(**options)
    except TypeError as error:
        known = ", ".join(Options.__slots__)
        raise UsageError(f"an unknown option of a policy ({str(error).split(') ')[-1]}): known are {known}") from None
    return decide(policy, trace, hardware, chosen)


def simulate(
    trace: Trace,
    plan: Plan | None = None,
    hardware: str | Path | Hardware = "rtx4090",
    *,
    memory_limit: int | None = None,
    timeline: bool = False,
) -> RunResult:
    """The numbers of one step on a machine that need not be there; without a plan: no offload.

    Raises:
        PlanMismatchError: the plan was not made from this trace.
    """
    from vdnn.sim import simulate_step

    return simulate_step(trace, plan, named_hardware(hardware), memory_limit=memory_limit, timeline=timeline)


def run(
    work: Work,
    policy: str = "vdnn-all",
    hardware: str | Path | Hardware = "rtx4090",
    *,
    plan: Plan | None = None,
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
        plan: a plan to execute, instead of a policy. It must be made for the device that runs.
        device: "virtual", "cuda", or "auto": CUDA where there is one.

    Raises:
        UsageError: an unknown name or option, or no CUDA device.
        PlanMismatchError: the plan was made for another model, batch or device.
        DeviceOutOfMemory: the virtual device's memory is spent.
    """
    from vdnn.training import find_place, run_policies

    place, machine = find_place(device), named_hardware(hardware)
    trace = capture(work, precision=precision, optimizer=optimizer, device="cuda" if place == "cuda" else "cpu")
    made = plan if plan is not None else _decide(trace, machine, policy, options)
    simulate(trace, made, machine)  # refuses a plan that is not for this trace, before anything runs
    return list(run_policies(work, trace, [made], machine, place, steps=steps, seed=seed))[-1]


def wrap(
    model: nn.Module,
    policy: str = "vdnn-all",
    *,
    plan: Plan | None = None,
    device: Device | None = None,
    hardware: str | Path | Hardware = "rtx4090",
    **options: Any,
) -> nn.Module:
    """Offload what autograd saves in the model's forward, in place; returns the model. `unwrap` undoes it.

    With a policy, the step is captured at the first training call of each input shape, from the real inputs, and
    planned from that (the loss is taken for a sum of the outputs; what a loss outside the model saves stays). A
    model that cannot be captured is offloaded by rule. With a plan, that plan is executed.

    Args:
        device: default: the model's own. For a model on the CPU offload is inactive unless a virtual device is given.
        hardware: the machine that the policy plans for.

    Raises:
        UsageError: an unknown policy or option.
        PlanMismatchError: the plan was made for another model.
        EngineError: the model is wrapped already.
    """
    from vdnn.engine import CudaDevice, Schedule, wrap_model
    from vdnn.policies import find

    find(policy)
    names = {fqn for fqn, _ in model.named_modules()}
    if plan is not None:
        Schedule(plan).check_names(names)
    place = next((p.device for p in (*model.parameters(), *model.buffers())), None)
    if device is None:
        if place is None or place.type != "cuda":
            log.warning("vdnn: the model is on the CPU: offload is inactive (name a virtual device to run it there)")
            return model
        device = CudaDevice(place.index)
    planner = _Planner(
        plan, policy, named_hardware(hardware), "cuda" if isinstance(device, CudaDevice) else "cpu", options
    )
    wrap_model(model, device, planner.schedule)
    return model


class _Planner:
    """Plans at the first training call of each input shape, and remembers."""

    def __init__(self, fixed: Plan | None, policy: str, hardware: Hardware, kind: str, options: dict[str, Any]) -> None:
        self.fixed = fixed
        self.policy = policy
        self.hardware = hardware
        self.kind = kind
        self.options = options
        self.made: dict[Any, Any] = {}

    def schedule(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The schedule for a call with these inputs."""
        from vdnn.engine import Schedule

        if self.fixed is not None:
            if self.fixed not in self.made:
                self.made[self.fixed] = Schedule(self.fixed)
            return self.made[self.fixed]
        key = _shapes(args, kwargs)
        if key not in self.made:
            self.made[key] = self._make(model, args, kwargs)
        return self.made[key]

    def _make(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        import torch

        from vdnn.engine import Rule, Schedule
        from vdnn.errors import CaptureError
        from vdnn.tracing import capture_model

        enabled = torch.is_autocast_enabled(self.kind)
        precision = "fp32"
        if enabled:
            precision = "amp-bf16" if torch.get_autocast_dtype(self.kind) is torch.bfloat16 else "amp"
        try:
            trace = capture_model(model, args, kwargs, precision=precision, device=self.kind, name=type(model).__name__)
        except CaptureError as error:
            log.warning("vdnn: %s; offloading by rule instead", error)
            return Schedule(None, _rule(self.policy, self.options, Rule))
        made = plan(trace, self.hardware, self.policy, **self.options)
        log.info("vdnn: %s: offloads %d bytes a step", made.policy, made.offloaded_bytes)
        return Schedule(made)


def _rule(policy: str, options: dict[str, Any], rule: Any) -> Any:
    from torch.nn.modules.conv import _ConvNd

    if policy == "none":
        return rule(offload=False)
    types = (_ConvNd,) if policy == "vdnn-conv" else ()
    return rule(min_bytes=options.get("min_bytes", 1 << 20), types=types)


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    import torch
    from torch.utils._pytree import tree_leaves

    return tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in tree_leaves((args, kwargs))
    )


def unwrap(model: nn.Module) -> nn.Module:
    """Undo `wrap`.

    Raises:
        EngineError: the model is not wrapped.
    """
    from vdnn.engine import unwrap_model

    unwrap_model(model)
    return model


def report(model: nn.Module) -> EngineReport:
    """What the engine did to a wrapped model so far; prints as a table.

    Raises:
        EngineError: the model is not wrapped.
    """
    from vdnn.engine import engine_of

    return engine_of(model).report()


def offload(
    policy: str = "vdnn-all", *, device: Device | None = None, model: nn.Module | None = None, **options: Any
) -> AbstractContextManager[Offloader]:
    """Offload by rule whatever autograd saves inside a `with` block: a loop, a function, part of a model.

    Raises:
        UsageError: an unknown policy, or no CUDA device and no virtual one given.
    """
    from vdnn.engine import CudaDevice, Rule, offloading
    from vdnn.policies import find

    find(policy)
    return offloading(device or CudaDevice(), _rule(policy, options, Rule), model)


def track(model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> Tracker:
    """A memory tracker of anything: `with vdnn.track(model) as tracker: …`, then `tracker.result()`."""
    from vdnn.tracker import track as tracker

    return tracker(model, optimizer, **options)
