"""The command line: verbs on models and files. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vdnn import api
from vdnn.errors import UsageError, VdnnError
from vdnn.values import Plan, RunResult, Trace, hardware, preset_ids
from vdnn.values import load as load_value
from vdnn.values import save as save_value

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Model = Annotated[str, typer.Argument(help="paper:vgg16, torchvision:resnet50, hf:gpt2, file.py:factory, or a trace")]
Batch = Annotated[str, typer.Option("--batch", "-b", help="Batch size.")]
Gpu = Annotated[str, typer.Option(help="A GPU by id (`vdnn list gpus`), or a hardware file.")]
Precision = Annotated[str, typer.Option(help="fp32, amp, amp-bf16 or bf16.")]
Optimizer = Annotated[str, typer.Option(help="none, sgd or adamw.")]
Rules = Annotated[str, typer.Option(help="event, or paper: synchronise at every layer as vDNN did.")]
Set = Annotated[list[str] | None, typer.Option("-O", metavar="KEY=VALUE", help="A model option: image_size=64.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Write the value to this file.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output.")]


def _options(texts: list[str] | None) -> dict[str, object]:
    found: dict[str, object] = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"-O {text!r} is no option: write it like image_size=64")
        found[key] = value
    return found


def _trace(
    model: str, batch: str, precision: str, optimizer: str, texts: list[str] | None, device: str = "cuda"
) -> Trace:
    if model.endswith((".json", ".json.gz")):
        loaded = load_value(model, "trace")
        assert isinstance(loaded, Trace)
        return loaded
    work = api.load(model, batch, **_options(texts))
    return api.capture(work, precision=precision, optimizer=optimizer, device=device)


def _free(path: Path | None, force: bool) -> None:
    if path is not None and path.exists() and not force:
        raise UsageError(f"{path} exists: give another name, or --force to overwrite it")


def _write(value: Any, path: Path | None) -> None:
    if path is not None:
        save_value(value, path)
        typer.echo(f"Wrote {path}", err=True)


def _show(results: list[RunResult], as_json: bool) -> None:
    from vdnn.reporting import as_text, result_rows, results_table

    if as_json:
        rows = result_rows(results)
        typer.echo(json.dumps(rows[0] if len(rows) == 1 else rows, indent=1))
    else:
        typer.echo(as_text(results_table(results)), nl=False)


@app.command()
def capture(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The trace's file: NAME.json or NAME.json.gz.")],
    batch: Batch = "32",
    precision: Precision = "fp32",
    optimizer: Optimizer = "none",
    device: Annotated[str, typer.Option(help="cuda, or cpu for the virtual device.")] = "cuda",
    options: Set = None,
    force: Force = False,
) -> None:
    """Write one training step of a model down, without a GPU.

    Example: vdnn capture torchvision:resnet50 --batch 64 -o resnet50.json.gz
    """
    _free(output, force)
    _write(_trace(model, batch, precision, optimizer, options, device), output)


@app.command()
def plan(
    model: Model,
    gpu: Gpu,
    policy: Annotated[str, typer.Option(help="A policy (`vdnn list policies`).")] = "vdnn-all",
    batch: Batch = "32",
    precision: Precision = "fp32",
    optimizer: Optimizer = "none",
    rules: Rules = "event",
    options: Set = None,
    output: Output = None,
    force: Force = False,
) -> None:
    """Decide for every saved storage, and say what was decided.

    Example: vdnn plan paper:vgg16 --batch 64 --gpu titan-x --policy vdnn-conv -o vgg16.plan.json
    """
    from vdnn.reporting import as_text, plan_report

    _free(output, force)
    made = api.plan(_trace(model, batch, precision, optimizer, options), gpu, policy, rules=rules)
    typer.echo(as_text(plan_report(made)), nl=False)
    _write(made, output)


@app.command()
def simulate(
    model: Model,
    gpu: Gpu,
    policy: Annotated[str, typer.Option(help="A policy (`vdnn list policies`).")] = "none",
    plan_file: Annotated[Path | None, typer.Option("--plan", help="A plan's file, instead of a policy.")] = None,
    batch: Batch = "32",
    precision: Precision = "fp32",
    optimizer: Optimizer = "none",
    rules: Rules = "event",
    options: Set = None,
    as_json: Json = False,
    output: Output = None,
    force: Force = False,
) -> None:
    """Predict memory and time of one training step on a GPU.

    Example: vdnn simulate torchvision:resnet50 --batch 256 --gpu rtx4090 --policy vdnn-all --json
    """
    _free(output, force)
    trace = _trace(model, batch, precision, optimizer, options)
    if plan_file is not None:
        made = load_value(plan_file, "plan")
        assert isinstance(made, Plan)
    else:
        made = api.plan(trace, gpu, policy, rules=rules)
    baseline = api.simulate(trace, None, gpu)
    result = api.simulate(trace, made, gpu, timeline=output is not None)
    if as_json:
        from vdnn.reporting import result_rows

        typer.echo(json.dumps(result_rows([result], baseline)[0], indent=1))
    else:
        _show([baseline] if made.policy == "none" else [baseline, result], False)
    _write(result, output)


@app.command()
def compare(
    model: Model,
    gpu: Gpu,
    policy: Annotated[list[str] | None, typer.Option(help="A policy; again for another. Default: all.")] = None,
    batch: Batch = "32",
    precision: Precision = "fp32",
    optimizer: Optimizer = "none",
    rules: Rules = "event",
    options: Set = None,
    as_json: Json = False,
) -> None:
    """Predict one training step under several policies, from one capture.

    Example: vdnn compare paper:vgg16 --batch 128 --gpu titan-x --rules paper
    """
    from vdnn.policies import find, names

    chosen = policy or list(names())
    for name in chosen:
        find(name)
    hardware(gpu)
    trace = _trace(model, batch, precision, optimizer, options)
    ordered = ["none", *(name for name in chosen if name != "none")]
    _show([api.simulate(trace, api.plan(trace, gpu, name, rules=rules), gpu) for name in ordered], as_json)


@app.command()
def report(file: Annotated[Path, typer.Argument(help="A trace, a plan, or a result.")]) -> None:
    """Show what a file holds.

    Example: vdnn report resnet50.json.gz
    """
    from vdnn.reporting import as_text, hardware_table, plan_report, result_report, trace_report

    value = load_value(file)
    if isinstance(value, Trace):
        typer.echo(as_text(trace_report(value)), nl=False)
    elif isinstance(value, Plan):
        typer.echo(as_text(plan_report(value)), nl=False)
    elif isinstance(value, RunResult):
        typer.echo(as_text(result_report(value)), nl=False)
    else:
        typer.echo(as_text(hardware_table([value])), nl=False)


@app.command("list")
def list_(what: Annotated[str, typer.Argument(help="models, gpus or policies.")]) -> None:
    """Show what there is.

    Example: vdnn list gpus
    """
    from vdnn.errors import unknown_name

    if what == "gpus":
        from vdnn.reporting import as_text, hardware_table

        typer.echo(as_text(hardware_table([hardware(gpu) for gpu in preset_ids()])), nl=False)
    elif what == "policies":
        from vdnn.policies import names

        typer.echo("\n".join(names()))
    elif what == "models":
        from vdnn.models import list_models

        typer.echo("\n".join(f"{source}:{name}" for source, found in list_models().items() for name in found))
    else:
        raise unknown_name("list", what, ("models", "gpus", "policies"))


def main() -> None:
    """Run the command line; a user's mistake is one sentence and an exit code, `--debug` shows the traceback."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments)
    except VdnnError as error:
        if debug:
            raise
        typer.echo(f"vdnn: {error}", err=True)
        sys.exit(error.exit_code)
