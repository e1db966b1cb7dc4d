"""`reproduction`: how far the paper's figures are reproduced, from the files that an experiment wrote."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vdnn.cli.arguments import Json

__all__ = ["reproduction"]


def reproduction(
    folder: Annotated[Path, typer.Argument(help="The results of experiments/paper.toml.")] = Path("results/paper"),
    into: Annotated[Path | None, typer.Option(help="Put the table between the marks of this Markdown file.")] = None,
    as_json: Json = False,
) -> None:
    """Show for each figure of the vDNN paper how many values are reproduced, and the worst difference.

    Example: vdnn reproduction results/paper --into README.md
    """
    from vdnn.reproduction import differences, readme_table, summaries
    from vdnn.reproduction.page import write_readme

    if as_json:
        typer.echo(json.dumps([asdict(row) for row in summaries(differences(folder))], indent=1))
    else:
        typer.echo(readme_table(folder))
    if into is not None:
        write_readme(folder, into)
        typer.echo(f"Wrote {into}", err=True)
