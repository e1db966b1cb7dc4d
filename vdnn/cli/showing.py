"""`report` and `list`: what a file holds, and what names there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vdnn.choosing import BUDGET
from vdnn.cli.arguments import Json, show
from vdnn.errors import unknown_name
from vdnn.values import Hardware, Plan, RunResult, Trace, hardware, preset_ids
from vdnn.values import load as load_value

__all__ = ["list_names", "report"]


def report(
    file: Annotated[Path, typer.Argument(help="A trace, a plan, a result, or a hardware file.")], as_json: Json = False
) -> None:
    """Show what a file holds.

    Example: vdnn report resnet50.json.gz
    """
    value = hardware(file) if file.suffix == ".toml" else load_value(file)
    shown, row = _shown(value)
    if as_json:
        typer.echo(json.dumps(row, indent=1))
    else:
        show(shown)


def _shown(value: object) -> tuple[Any, dict[str, Any]]:
    """A value as a report, and as a JSON row of the same numbers."""
    from vdnn import reporting

    if isinstance(value, Trace):
        found = reporting.summarise(value)
        return reporting.trace_report(found), reporting.as_rows([found])[0]
    if isinstance(value, Plan):
        entries = reporting.as_rows(reporting.plan_rows(value))
        return reporting.plan_report(value), {**reporting.plan_head(value), "entries": entries}
    if isinstance(value, RunResult):
        row = reporting.result_rows([value])[0]
        row |= {"peak_at": value.peak_at, "peak": reporting.as_rows(reporting.by_category(value))}
        return reporting.result_report(value), {**row, "notes": list(value.notes)}
    if isinstance(value, Hardware):
        return reporting.hardware_table([value]), reporting.hardware_row(value)
    raise unknown_name("kind of value", type(value).__name__, ("trace", "plan", "result", "hardware"))


def list_names(
    what: Annotated[str, typer.Argument(metavar="models|gpus|policies", help="What to list.")], as_json: Json = False
) -> None:
    """Show what there is.

    Example: vdnn list gpus
    """
    rows: list[Any]
    if what == "gpus":
        from vdnn.reporting import hardware_row, hardware_table

        machines = [hardware(gpu) for gpu in preset_ids()]
        rows, shown = [hardware_row(machine) for machine in machines], hardware_table(machines)
    elif what == "policies":
        from vdnn.policies import names, summary
        from vdnn.reporting.sheet import Column, Sheet

        rows = [{"policy": name, "does": summary(name)} for name in names()]
        rows.append({"policy": BUDGET, "does": "What the planner finds: the fastest plan that fits the budget."})
        cells = tuple((row["policy"], row["does"]) for row in rows)
        shown = Sheet("", (Column("policy", words=True), Column("what it does", words=True)), cells)
    elif what == "models":
        from vdnn.models import list_models

        rows = [f"{source}:{name}" for source, found in list_models().items() for name in found]
        shown = None
    else:
        raise unknown_name("list", what, ("models", "gpus", "policies"))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    elif shown is None:
        typer.echo("\n".join(rows))
    else:
        show(shown)
