"""The command line: verbs on models and files. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import Annotated

import typer

from vdnn import __version__
from vdnn.cli.advising import advise
from vdnn.cli.fitting import fit
from vdnn.cli.measuring import measure
from vdnn.cli.predicting import capture, compare, max_batch, plan, simulate
from vdnn.cli.replaying import replay
from vdnn.cli.reproducing import reproduction
from vdnn.cli.running import experiment, run
from vdnn.cli.showing import list_names, report
from vdnn.cli.starting import without_compiler
from vdnn.errors import VdnnError

__all__ = ["app", "command_line", "main"]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vdnn {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train PyTorch models that do not fit on the GPU, and know beforehand what that will cost.

    Results go to stdout, everything else to stderr. Exit codes: 0, 1 (failed), 2 (usage), 3 (no plan fits the budget).
    With --debug an error shows its traceback.
    """


for command in (run, capture, plan, simulate, compare, advise, experiment, measure, fit, report, replay, reproduction):
    app.command()(command)
app.command("max-batch")(max_batch)
app.command("list")(list_names)

# commands that train nothing, so that torch needs no compiler
_COMPUTE_NOTHING = ("capture", "plan", "simulate", "compare", "advise", "max-batch")


def command_line() -> None:
    """Run the command line; a user's mistake is one sentence and an exit code, `--debug` shows the traceback."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if arguments and arguments[0] in _COMPUTE_NOTHING:
        without_compiler()
    try:
        app(arguments)
    except VdnnError as error:
        if debug:
            raise
        typer.echo(f"vdnn: {error}", err=True)
        sys.exit(error.exit_code)


def main() -> None:
    """`command_line` in a process of its own, which ends at once: to unload torch's libraries takes half a second."""
    code: object = 0
    try:
        command_line()
    except SystemExit as done:
        code = done.code
    if code is not None and not isinstance(code, int):
        sys.exit(str(code))
    logging.shutdown()
    with contextlib.suppress(BrokenPipeError):  # whoever read our output has seen enough
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)
