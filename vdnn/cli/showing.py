"""`report` and `list`: what a file holds, and what names there are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vdnn.errors import unknown_name
from vdnn.values import Hardware, Plan, RunResult, Trace, hardware, preset_ids
from vdnn.values import load as load_value

__all__ = ["list_names", "report"]


def report(file: Annotated[Path, typer.Argument(help="A trace, a plan, a result, or a hardware file.")]) -> None:
    """Show what a file holds.

    Example: vdnn report resnet50.json.gz
    """
    from vdnn.reporting import as_text, hardware_table, plan_report, result_report, trace_report

    value = hardware(file) if file.suffix == ".toml" else load_value(file)
    if isinstance(value, Trace):
        shown = as_text(trace_report(value))
    elif isinstance(value, Plan):
        shown = as_text(plan_report(value))
    elif isinstance(value, RunResult):
        shown = as_text(result_report(value))
    elif isinstance(value, Hardware):
        shown = as_text(hardware_table([value]))
    else:
        raise unknown_name("kind of value", type(value).__name__, ("trace", "plan", "result", "hardware"))
    typer.echo(shown, nl=False)


def list_names(what: Annotated[str, typer.Argument(help="models, gpus or policies.")]) -> None:
    """Show what there is.

    Example: vdnn list gpus
    """
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
