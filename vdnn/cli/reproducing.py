"""`reproduction`: how far the paper's figures are reproduced, from the files that an experiment wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["reproduction"]


def reproduction(
    folder: Annotated[Path, typer.Argument(help="The results of experiments/paper.toml.")] = Path("results/paper"),
    into: Annotated[Path | None, typer.Option(help="Put the table between the marks of this Markdown file.")] = None,
) -> None:
    """Show for each figure of the vDNN paper how many values are reproduced, and the worst difference.

    Example: vdnn reproduction results/paper --into README.md
    """
    from vdnn.reproduction import readme_table
    from vdnn.reproduction.page import write_readme

    typer.echo(readme_table(folder))
    if into is not None:
        write_readme(folder, into)
        typer.echo(f"Wrote {into}", err=True)
