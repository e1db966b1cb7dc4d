"""Iteration time on the CPU that is there: measured kernel by kernel, then predicted and measured model by model.

results/<name>/hardware.toml                   what `vdnn measure --device cpu` finds
               runs/cpu-<model>-<batch>.json   real steps; .predicted.json beside it
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vdnn import api
from vdnn.errors import FormatError
from vdnn.reporting import provenance, result_row
from vdnn.reporting.sheet import Column, Sheet, as_text
from vdnn.values import RunResult, hardware, load, save, to_toml

__all__ = [
    "CPU_KEYS",
    "Cpu",
    "CpuModel",
    "cpu_rows",
    "draw_cpu",
    "files_of",
    "machine_file",
    "measure_machine",
    "read_cpu",
    "run_model",
]

BAND = 0.2
WIDTH = 120


@dataclass(frozen=True, slots=True)
class CpuModel:
    """One model with its batch. `seen` says that its numbers were looked at while the cost model was made."""

    name: str
    batch: int
    seen: bool
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Cpu:
    """The section `[cpu]` of an experiment."""

    title: str
    text: str
    file: str
    caption: str
    threads: int
    steps: int
    optimizer: str
    models: tuple[CpuModel, ...]


CPU_KEYS: dict[str, tuple[Any, Any]] = {  # key: type, default (... where there is none)
    "title": (str, ...),
    "text": (str, ""),
    "file": (str, ...),
    "caption": (str, ""),
    "threads": (int, 1),
    "steps": (int, 5),
    "optimizer": (str, "sgd"),
    "models": (list, ...),
}


def read_cpu(read: dict[str, Any], where: str, check_step: Callable[..., None]) -> Cpu:
    """The section from its table, whose keys and types were checked.

    Raises:
        FormatError: a model that is not written as one, or a number below 1.
    """
    models = []
    for row in read["models"]:
        if not isinstance(row, dict) or not {"model", "batch"} <= row.keys():
            raise FormatError(f'{where}: a model is written {{ model = "torchvision:resnet50", batch = 4 }}')
        options = {key: value for key, value in row.items() if key not in ("model", "batch", "seen")}
        check_step(row["model"], row["batch"], "fp32", read["optimizer"], options)
        models.append(CpuModel(row["model"], row["batch"], row.get("seen", False), tuple(sorted(options.items()))))
    for name in ("threads", "steps"):
        if read[name] < 1:
            raise FormatError(f"{where}: {name} is {read[name]}, it must be at least 1")
    return Cpu(**{**read, "models": tuple(models)})


def machine_file(folder: Path) -> Path:
    """Where the machine is written down."""
    return folder / "hardware.toml"


def files_of(folder: Path, model: CpuModel) -> tuple[Path, Path]:
    """(measured, predicted) of a model."""
    stem = f"cpu-{model.name.replace(':', '-')}-{model.batch}"
    return folder / "runs" / f"{stem}.json", folder / "runs" / f"{stem}.predicted.json"


def measure_machine(cpu: Cpu, folder: Path) -> None:
    """Measure this CPU with the threads of the section."""
    import torch

    from vdnn.measuring import measure_device

    before = torch.get_num_threads()
    torch.set_num_threads(cpu.threads)
    try:
        machine_file(folder).write_text(to_toml(measure_device("cpu")))
    finally:
        torch.set_num_threads(before)


def run_model(cpu: Cpu, model: CpuModel, folder: Path) -> None:
    """Predict a model's step from its capture, then train some and write both down.

    Raises:
        FormatError: the machine was not measured, or its file is damaged.
    """
    import torch

    if not machine_file(folder).exists():
        raise FormatError(f"{machine_file(folder)} is not there: run the experiment again, it is measured first")
    work = api.load(model.name, model.batch, **dict(model.options))
    trace = api.capture(work, device="cpu", optimizer=cpu.optimizer)
    predicted = replace(api.simulate(trace, None, hardware(machine_file(folder))), provenance=provenance(trace.torch))
    before = torch.get_num_threads()
    torch.set_num_threads(cpu.threads)
    try:
        times = _step_times(work, cpu)
    finally:
        torch.set_num_threads(before)
    shown = ", ".join(f"{ns / 1e6:.0f}" for ns in times)
    load1 = os.getloadavg()[0]
    measured = replace(
        predicted,
        source="measured",
        iteration_time_ns=int(statistics.median(times)),
        forward_time_ns=None,
        backward_time_ns=None,
        stall_ns=None,
        peak_requested_bytes=None,
        peak_at="",
        peak_items=(),
        fits=None,
        notes=(f"steps of {shown} ms after the first; load of the machine {load1:.1f}",),
    )
    save(predicted, files_of(folder, model)[1])
    save(measured, files_of(folder, model)[0])


def _step_times(work: Any, cpu: Cpu) -> list[int]:
    """Times of the steps after the first, each from forward to the end of the optimizer."""
    import torch

    from vdnn.measuring.clock import now_ns
    from vdnn.tracing.stage import make_optimizer

    torch.manual_seed(0)
    model = work.build()
    args, kwargs = work.inputs("cpu")
    targets = work.targets("cpu")
    optimizer = make_optimizer(cpu.optimizer, model)
    times = []
    for _ in range(cpu.steps + 1):
        start = now_ns()
        loss = work.loss(model(*args, **kwargs), targets)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        del loss
        model.zero_grad(set_to_none=True)
        times.append(now_ns() - start)
    return times[1:]


# -- the page ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Step:
    """One model's step, predicted and measured."""

    model: CpuModel
    predicted: RunResult
    measured: RunResult

    @property
    def times_ns(self) -> tuple[int, int]:
        """Of an iteration, predicted and measured."""
        assert self.predicted.iteration_time_ns is not None
        assert self.measured.iteration_time_ns is not None
        return self.predicted.iteration_time_ns, self.measured.iteration_time_ns

    @property
    def error(self) -> float:
        """How much more was predicted than measured, as a part of what was measured."""
        predicted, measured = self.times_ns
        return predicted / measured - 1


def _steps(cpu: Cpu, folder: Path) -> list[_Step]:
    found = []
    for model in cpu.models:
        measured, predicted = (load(path, "result") for path in files_of(folder, model))
        assert isinstance(measured, RunResult)
        assert isinstance(predicted, RunResult)
        found.append(_Step(model, predicted, measured))
    return found


def cpu_rows(cpu: Cpu, folder: Path) -> list[dict[str, Any]]:
    """JSON rows: the columns of each real step, what was predicted and its error, and whether it was seen before."""
    return [
        {
            **result_row(step.measured),
            "options": dict(step.model.options),
            "predicted_iteration_time_ns": step.times_ns[0],
            "error": step.error,
            "seen": step.model.seen,
        }
        for step in _steps(cpu, folder)
    ]


def draw_cpu(cpu: Cpu, folder: Path) -> list[str]:
    """Draw the figure, and the page's lines: a table by model, and the errors' median."""
    from vdnn.reporting.plots import prediction_figure, save_figure

    machine = hardware(machine_file(folder))
    rows, pairs = [], []
    errors: dict[bool, list[float]] = {True: [], False: []}
    for step in _steps(cpu, folder):
        model = step.model
        errors[model.seen].append(step.error)
        group = "seen while the cost model was made" if model.seen else "not seen"
        pairs.append((replace(step.predicted, policy=group), replace(step.measured, policy=group)))
        options = " ".join(f"{key}={value}" for key, value in model.options)
        times = [f"{ns / 1e6:.0f}" for ns in step.times_ns]
        error = f"{100 * step.error:+.1f}"
        rows.append((model.name, str(model.batch), options or "--", *times, error, "yes" if model.seen else "no"))
    save_figure(prediction_figure(pairs, BAND), folder / cpu.file)
    headers = ("model", "batch", "options", "predicted [ms]", "measured [ms]", "error [%]", "seen")
    columns = tuple(Column(header, words=i in (0, 2)) for i, header in enumerate(headers))
    said = [f"{machine.name}. {_summary('All', [*errors[True], *errors[False]])}"]
    said += [_summary(name, errors[seen]) for name, seen in (("Not seen", False), ("Seen", True)) if errors[seen]]
    table = as_text(Sheet("", columns, tuple(rows)), width=WIDTH)
    head = [f"## {cpu.title}", "", *([cpu.text.strip(), ""] if cpu.text.strip() else [])]
    figure = [f"![{cpu.caption}]({cpu.file})", "", cpu.caption, ""]
    return [*head, " ".join(said), "", *figure, "```", *table.strip("\n").splitlines(), "```", ""]


def _summary(name: str, errors: Sequence[float]) -> str:
    sizes = sorted(abs(e) for e in errors)
    within = sum(e <= BAND for e in sizes)
    return (
        f"{name}: median error {100 * statistics.median(sizes):.1f} %, largest {100 * sizes[-1]:.1f} %, "
        f"{within} of {len(sizes)} within {100 * BAND:.0f} %."
    )
