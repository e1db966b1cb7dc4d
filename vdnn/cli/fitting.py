"""`fit`: the numbers of the cost model, from a folder of published measurements."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vdnn.cli.arguments import CaptureMissing, CapturesFolder, Data, Force, Json, must_be_free
from vdnn.errors import UsageError

__all__ = ["fit", "study"]


def study(
    folder: Path,
    data: Path | None,
    captures: Path | None,
    capture: bool,
    force: bool,
    tell: Callable[[str, int, int], None],
) -> tuple[int, int]:
    """Capture the rows and do the fits that have no file in `folder` yet; how many were done, how many were there.

    Without measurements, files that are there are used as they are.

    Raises:
        UsageError: neither measurements nor files, or no row has a trace.
    """
    from vdnn import trace_cache
    from vdnn.fidelity import Captures, step_rows
    from vdnn.fidelity.times import Study, run_study

    if data is None:
        there = len(list(folder.glob("*.json")))
        if not there or force:
            raise UsageError("--data is missing: it names the folder of the published measurements (see docs/costs.md)")
        return 0, there
    kept = Captures(captures or trace_cache.folder().parent / "fidelity", capture)
    if capture:
        kept.make_all(step_rows(data), tell)
    made = Study(data, kept, tell)
    if not made.measured.rows:
        raise UsageError(f"no row of {data} has a trace in {kept.folder}: run without --no-capture")
    return run_study(made, folder, force, tell)


def fit(
    data: Data = None,
    captures: CapturesFolder = None,
    capture: CaptureMissing = True,
    folder: Annotated[Path, typer.Option(help="Where the fits are kept.")] = Path("results/fidelity/runs"),
    output: Annotated[Path, typer.Option("-o", "--output", help="The file of fitted numbers.")] = Path("fitted.toml"),
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Fit the cost model's numbers to measurements, and print how far predictions of rows left out are off.

    Families of models are left out in turn, and so are GPUs. Captures take seconds each, once.

    Example: vdnn fit --data measurements --output vdnn/costs/fitted.toml --force
    """
    from rich.console import Console

    from vdnn.fidelity.times import fitted_text, summaries, summary_lines

    must_be_free(output, force, (".toml",))
    console = Console(stderr=True)
    with console.status("reading …") as status:
        study(
            folder,
            data,
            captures,
            capture,
            force,
            lambda what, done, total: status.update(f"{what} {f'({done + 1} of {total})' if total else ''}…"),
        )
    if as_json:
        rows = [{"rows_of": what, "kept_out": how, **asdict(s)} for (what, how), s in summaries(folder).items()]
        typer.echo(json.dumps(rows, indent=1))
    else:
        typer.echo("\n".join(summary_lines(folder)))
    output.write_text(fitted_text(folder, "vdnn fit --data DIR"))
    typer.echo(f"Wrote {output}", err=True)
