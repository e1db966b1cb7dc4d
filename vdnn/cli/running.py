"""`run` and `experiment`: what trains for real, and what runs a whole file of cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vdnn import api
from vdnn.cli.arguments import (
    Batch,
    Budget,
    CaptureMissing,
    CapturesFolder,
    Data,
    Force,
    Gpu,
    Json,
    MinBytes,
    ModelName,
    ModelOptions,
    Optimizer,
    Output,
    Policy,
    Precision,
    Rules,
    busy,
    model_options,
    must_be_free,
    must_be_one,
    show,
    typed,
    write_value,
)
from vdnn.errors import EngineError, UsageError
from vdnn.values import Plan, hardware
from vdnn.values import load as load_value

__all__ = ["experiment", "run"]


def run(
    context: typer.Context,
    model: ModelName,
    gpu: Gpu,
    policy: Policy = "",
    budget: Budget = "",
    plan_file: Annotated[Path | None, typer.Option("--plan", help="A plan's file, instead of a policy.")] = None,
    batch: Batch = "32",
    steps: Annotated[int, typer.Option(help="Training steps; the last one is tracked.")] = 5,
    device: Annotated[str, typer.Option(help="auto, virtual, or cuda.")] = "auto",
    precision: Precision = "fp32",
    optimizer: Optimizer = "sgd",
    rules: Rules = "event",
    min_bytes: MinBytes = "1MiB",
    seed: Annotated[int, typer.Option(help="Of weights, dropout and the virtual device.")] = 0,
    options: ModelOptions = None,
    as_json: Json = False,
    output: Output = None,
    force: Force = False,
) -> None:
    """Train some steps with and without offload: are the tensors equal, did it fit, was the prediction right?

    Without a GPU it runs on a virtual device with the memory (less CUDA's context) and the link of the GPU named.

    Example: vdnn run demo:cnn --batch 16 --gpu rtx4090 --policy vdnn-conv
    """
    from vdnn.reporting import difference_rows, differences, prediction_table, result_rows
    from vdnn.training import find_place
    from vdnn.units import parse_size

    must_be_free(output, force)
    must_be_one(policy=policy, budget=budget, plan=plan_file, asked=typed(context))
    machine = hardware(gpu)
    find_place(device)
    if model.endswith((".json", ".json.gz")):
        raise UsageError(f"{model} is a file, and a run trains a model: name it like torchvision:resnet50")
    made = load_value(plan_file, "plan") if plan_file is not None else None
    assert made is None or isinstance(made, Plan)
    work = api.load(model, batch, **model_options(options))
    with busy(f"training {work}"):
        done = api.run(
            work,
            policy,
            machine,
            plan=made,
            budget=budget or None,
            device=device,
            steps=steps,
            precision=precision,
            optimizer=optimizer,
            seed=seed,
            rules=rules,
            min_bytes=parse_size(min_bytes),
        )
    if as_json:
        beside = difference_rows(done.predicted, done.measured, differences(done.predicted, done.measured))
        row = result_rows([done.measured], done.baseline)[0]
        row |= {"exact": done.exact, "losses": done.losses}
        row |= {"predicted": beside["predicted"], "differences": beside["differences"]}
        typer.echo(json.dumps(row, indent=1))
    else:
        show(prediction_table(done.predicted, done.measured))
        typer.echo(f"losses: {', '.join(f'{loss:.4f}' for loss in done.losses)}")
    write_value(done.measured, output)
    if not done.exact:
        raise EngineError(f"training with offload is not what it is without: {done.differs}")


def experiment(
    file: Annotated[Path, typer.Argument(help="What to run: a TOML file such as experiments/demo.toml.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The folder of results; default: results/<file's name>.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run again what has results already.")] = False,
    data: Data = None,
    captures: CapturesFolder = None,
    capture: CaptureMissing = True,
) -> None:
    """Run what a file names and has no result yet, then write its tables and figures.

    Example: vdnn experiment experiments/demo.toml
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with busy(f"reading {file}"):
        from vdnn.experiment import read_experiment, run_missing, write_page

        read = read_experiment(file)
    folder = output or Path("results") / read.name
    console = Console(stderr=True)
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        ran, there = run_missing(
            read,
            folder,
            force=force,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
        if read.fidelity:
            from vdnn.cli.fitting import study

            more = study(
                folder / "runs",
                data,
                captures,
                capture,
                force,
                lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None),
            )
            ran, there = ran + more[0], there + more[1]
        bar.update(task, description="drawing", completed=ran + there)
        text = write_page(read, folder)
    typer.echo(text, nl=False)
    if there:
        typer.echo(f"{ran} cases ran, {there} had results already (--force runs them again)", err=True)
    typer.echo(f"Wrote {folder}/README.md", err=True)
