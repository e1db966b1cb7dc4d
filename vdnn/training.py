"""Some real training steps of a work under plans, compared with the same steps without offload.

    for run in run_policies([(work, trace, None), (work, trace, plan), …], hardware, "virtual", …):
        run.predicted, run.measured, run.baseline

    plain = train(work, None, place, …)                   the steps as they are
    done = train(work, plan, place, …, expected=plain.steps)
    done.differs                                          "" if every tensor is torch.equal, else the first that is not
    done.result                                           the memory of the last step, by the tracker

The seed is set before the model is built and before each step, so that weights, inputs and dropout repeat.
The last step is tracked: a step in the middle of training, with the optimizer's states there. On CUDA its
time is the median of the steps before it, without the tracker; on a virtual device there is no time, because
a CPU's says nothing about a GPU's.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vdnn.engine import CudaDevice, EngineReport, Schedule, VirtualDevice, engine_of, unwrap_model, wrap_model
from vdnn.errors import DeviceOutOfMemory, UsageError, unknown_name
from vdnn.models import Work
from vdnn.reporting import as_text, prediction_table, provenance
from vdnn.sim import simulate_step
from vdnn.tracker import track
from vdnn.units import format_bytes
from vdnn.values import Hardware, Plan, RunResult, Trace

__all__ = ["PLACES", "Run", "Training", "find_place", "run_policies", "train"]

log = logging.getLogger("vdnn")

PLACES = ("auto", "virtual", "cuda")
_AUTOCAST = {"amp": torch.float16, "amp-bf16": torch.bfloat16}

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """What some steps gave: `steps` are the tensors of each (output, loss, gradients), copied to the host.

    `differs` names the first tensor that is not as expected ("" if all are, or nothing was expected), `compared`
    counts those that were compared. `engine` is None without a plan.
    """

    result: RunResult
    losses: tuple[float, ...]
    steps: tuple[Named, ...]
    compared: int
    differs: str
    engine: EngineReport | None


@dataclass(frozen=True)
class Run:
    """A policy's prediction beside what some real steps gave; `baseline` is measured, without offload."""

    predicted: RunResult
    measured: RunResult
    baseline: RunResult
    losses: tuple[float, ...]
    compared: int
    differs: str
    engine: EngineReport | None

    @property
    def exact(self) -> bool:
        """Whether every output, loss and gradient is `torch.equal` to the one without offload."""
        return not self.differs

    def __str__(self) -> str:
        losses = ", ".join(f"{loss:.4f}" for loss in self.losses)
        return f"{as_text(prediction_table(self.predicted, self.measured))}losses: {losses}"


def run_policies(
    cases: Sequence[tuple[Work, Trace, Plan | None]],
    hardware: Hardware,
    place: str,
    *,
    steps: int = 5,
    seed: int = 0,
    progress: Callable[[str, int], None] = lambda policy, step: None,
) -> Iterator[Run]:
    """Train each case, and compare it with the first one, which has no plan: that one with itself, trained again.

    On a virtual device a run without a plan has the memory it needs; its `fits` says whether that is there.

    Args:
        cases: works, with their traces for this place, and plans. The works differ in what they recompute at most;
            precision and optimizer are the traces'.
        progress: is told the policy and the number of each step that is done.

    Raises:
        UsageError, DeviceOutOfMemory, RaceError: as `train`.
    """

    def trained(work: Work, trace: Trace, plan: Plan | None, expected: Sequence[Named] | None) -> Training:
        name = plan.policy if plan else "none"
        return train(
            work,
            plan,
            place,
            hardware,
            steps=steps,
            precision=trace.precision,
            optimizer=trace.optimizer,
            seed=seed,
            expected=expected,
            bounded=plan is not None,
            progress=lambda step: progress(name, step),
        )

    plain = trained(*cases[0], None)
    for work, trace, plan in cases:
        predicted = replace(simulate_step(trace, plan, hardware), provenance=provenance(torch=str(torch.__version__)))
        try:
            done = trained(work, trace, plan, plain.steps)
        except DeviceOutOfMemory as error:
            needs = format_bytes(predicted.peak_requested_bytes)
            raise DeviceOutOfMemory(
                f"{work.name} (batch {work.batch}) under {predicted.policy}, predicted to need {needs}: {error}"
            ) from None
        verdict = (
            f"{steps} steps: {done.compared} outputs, losses and gradients are torch.equal to those without offload"
            if not done.differs
            else f"{steps} steps: NOT equal to those without offload: {done.differs}"
        )
        measured = replace(
            done.result, exact=not done.differs, notes=(verdict, *done.result.notes), trace=trace.fingerprint()
        )
        yield Run(predicted, measured, plain.result, done.losses, done.compared, done.differs, done.engine)


def find_place(name: str) -> str:
    """Where to run: "auto" is CUDA where there is one.

    Raises:
        UsageError: no such place, or no CUDA device.
    """
    if name not in PLACES:
        raise unknown_name("device", name, PLACES)
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise UsageError(f"there is no CUDA device here (torch {torch.__version__}, {built}): use --device virtual")
    return "cuda" if there and name != "virtual" else "virtual"


def train(
    work: Work,
    plan: Plan | None,
    place: str,
    hardware: Hardware,
    *,
    steps: int = 5,
    precision: str = "fp32",
    optimizer: str = "none",
    seed: int = 0,
    expected: Sequence[Named] | None = None,
    bounded: bool = True,
    progress: Callable[[int], None] = lambda step: None,
) -> Training:
    """Train for some steps; with `expected`, compare each step's tensors as they come.

    Args:
        place: "virtual" or "cuda". A virtual device has the link of `hardware`, and its memory less CUDA's context.
        bounded: whether a virtual device ends where that memory does.
        progress: is told the number of each step that is done.

    Raises:
        UsageError: less than 2 steps (the first makes the optimizer's states).
        DeviceOutOfMemory: the virtual device's memory is spent.
        RaceError: a copy was not ordered after what it depends on.
    """
    if steps < 2:
        raise UsageError(f"{steps} steps are too few: the first one makes the optimizer's states, so run 2 or more")
    kind = "cuda" if place == "cuda" else "cpu"
    device = CudaDevice() if place == "cuda" else _virtual(hardware, seed, bounded)
    with _deterministic(kind):
        torch.manual_seed(seed)
        model, args, kwargs, targets = _built(work, kind, precision)
        optimize = _optimizer(optimizer, model)
        if plan is not None:
            schedule = Schedule(plan)
            schedule.check_names({fqn for fqn, _ in model.named_modules()})
            wrap_model(model, device, lambda *_: schedule)
        losses: list[float] = []
        found: list[Named] = []
        times: list[int] = []
        compared, differs = 0, ""
        for step in range(steps):
            last = step == steps - 1
            torch.manual_seed(seed + 1 + step)
            tracker = track(model, optimize, device=kind) if last else None
            if last and isinstance(device, VirtualDevice):
                device.account.reset_peak()
            start = _now(kind)
            with contextlib.ExitStack() as stack:
                if isinstance(device, VirtualDevice):
                    stack.enter_context(device)  # here only: the copies made below are not in its memory
                if tracker is not None:
                    stack.enter_context(tracker)
                with torch.autocast(kind, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST):
                    output = model(*args, **kwargs)
                    loss = work.loss(output, targets)
                loss.backward()
                if optimize is not None:
                    optimize.step()
            times.append(_now(kind) - start)
            tensors = _tensors(output, loss, model)
            losses.append(float(tensors["loss"]))
            del output, loss
            model.zero_grad(set_to_none=True)
            if expected is None:
                found.append(tensors)
            else:
                compared += len(tensors)
                differs = differs or _first_difference(step, tensors, expected[step])
            progress(step + 1)
        if isinstance(device, VirtualDevice):
            device.finish()
        assert tracker is not None
        result = tracker.result(
            model=work.name,
            batch=work.batch,
            gpu=hardware.id,
            policy=plan.policy if plan else "none",
            precision=precision,
            trace=plan.trace if plan else "",
            plan=plan.fingerprint() if plan else "",
        )
        report = None
        if plan is not None:
            report = engine_of(model).report()
            unwrap_model(model)
    return Training(
        result=_completed(result, hardware.available_bytes, device, report, steps, times, kind, seed),
        losses=tuple(losses),
        steps=tuple(found),
        compared=compared,
        differs=differs,
        engine=report,
    )


def _virtual(hardware: Hardware, seed: int, bounded: bool) -> VirtualDevice:
    memory = hardware.available_bytes if bounded else None
    return VirtualDevice(memory, d2h=hardware.d2h_bytes_per_s, h2d=hardware.h2d_bytes_per_s, seed=seed)


def _built(work: Work, kind: str, precision: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]:
    """Model, inputs and targets on a device; weights and inputs are drawn on the CPU, the same for every device."""
    model = work.build().to(kind)
    args, kwargs = work.inputs(kind)
    if precision == "bf16":
        model = model.bfloat16()
        args = tuple(_lowered(x) for x in args)
        kwargs = {key: _lowered(x) for key, x in kwargs.items()}
    return model, args, kwargs, work.targets(kind)


def _lowered(x: Any) -> Any:
    return x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x


def _optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer | None:
    """The optimizers that a capture knows, with the same arguments."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=True)
    if name == "adamw":
        return torch.optim.AdamW(parameters, foreach=True)
    return None


@contextlib.contextmanager
def _deterministic(kind: str) -> Iterator[None]:
    """Kernels that give the same bits each time: without them, the plain run differs from itself."""
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    state = torch.random.get_rng_state()
    if kind == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark
        torch.random.set_rng_state(state)


def _now(kind: str) -> int:
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter_ns()


# -- comparison ----------------------------------------------------------------------------------


def _tensors(output: Any, loss: Tensor, model: nn.Module) -> Named:
    found = {"loss": loss.detach().to("cpu", copy=True)}
    parts = list(output.values()) if isinstance(output, dict) else tree_leaves(output)
    for number, part in enumerate(part for part in parts if isinstance(part, Tensor)):
        found[f"output {number}"] = part.detach().to("cpu", copy=True)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad.detach().to("cpu", copy=True)
    return found


def _first_difference(step: int, ours: Named, theirs: Named) -> str:
    if ours.keys() != theirs.keys():
        return f"step {step + 1}: one run has {min(ours.keys() ^ theirs.keys())}, the other has not"
    for name, tensor in ours.items():
        if not torch.equal(tensor, theirs[name]):
            most = (tensor.double() - theirs[name].double()).abs().max().item()
            return f"step {step + 1}: {name} differs by up to {most:.3g}"
    return ""


def _completed(
    result: RunResult,
    available_bytes: int,
    device: CudaDevice | VirtualDevice,
    report: EngineReport | None,
    steps: int,
    times: Sequence[int],
    kind: str,
    seed: int,
) -> RunResult:
    """The tracker's result with what the engine and the device know."""
    host_peak = device.host_bytes().peak_bytes
    notes = list(result.notes)
    fits = None
    if isinstance(device, VirtualDevice):
        fits = device.peak_bytes <= available_bytes
        if device.peak_bytes != result.peak_requested_bytes:
            notes.append(
                f"the virtual device's own account has a peak of {format_bytes(device.peak_bytes)}, the tracker "
                f"{format_bytes(result.peak_requested_bytes)}"
            )
    origin = provenance(result.provenance.torch, result.provenance.cuda, result.provenance.device, seed)
    return replace(
        result,
        provenance=origin,
        iteration_time_ns=int(statistics.median(times[1:-1] or times[1:])) if kind == "cuda" else None,
        offloaded_bytes=report.offloaded_bytes // steps if report else 0,
        prefetched_bytes=report.returned_bytes // steps if report else 0,
        host_peak_bytes=host_peak,
        fits=fits,
        notes=tuple(notes),
    )
