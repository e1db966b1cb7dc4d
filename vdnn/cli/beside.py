"""Measured results from files, each beside its prediction: what `vdnn compare --measured` shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer

from vdnn.errors import UsageError
from vdnn.values import RunResult
from vdnn.values import load as load_value

__all__ = ["measured_pairs", "show_pairs"]

Pair = tuple[RunResult, RunResult]
_PREDICTED = ".predicted"


def measured_pairs(paths: Sequence[Path], predictions: Sequence[RunResult] = ()) -> list[Pair]:
    """(predicted, measured) of every measured result in the files and folders.

    The prediction is the one of `predictions` of the same model, batch, GPU, precision and policy, else the file
    NAME.predicted.json beside NAME.json, which `vdnn experiment` writes. A result without either is named.

    Raises:
        UsageError: a path that is not there, or no measured result with a prediction in any of them.
        FormatError: a file that is named itself and is no result.
    """
    own = {_step(result): result for result in predictions}
    found: list[Pair] = []
    without = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path} is not there: give a measured result's file, or a folder of them")
        for file in _files(path):
            value = load_value(file, "result")
            if not isinstance(value, RunResult) or value.source != "measured":
                continue
            beside = file.with_name(file.name.replace(".json", f"{_PREDICTED}.json", 1))
            predicted = own.get(_step(value))
            if predicted is None and beside.exists():
                loaded = load_value(beside, "result")
                assert isinstance(loaded, RunResult)
                predicted = loaded
            if predicted is None:
                without.append(f"{file} ({value.model}, batch {value.batch}, {value.gpu}, {value.policy})")
            else:
                found.append((predicted, value))
    for name in without:
        typer.echo(f"vdnn: no prediction for {name}: name its model, --gpu, --batch and --policy", err=True)
    if not found:
        named = " and ".join(map(str, paths))
        raise UsageError(f"there is no measured result with a prediction in {named}: `vdnn run … -o` writes one")
    return found


def _step(result: RunResult) -> tuple[object, ...]:
    return result.model, result.batch, result.gpu, result.precision, result.policy


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for end in ("*.json", "*.json.gz") for file in path.rglob(end))
    return [file for file in files if _PREDICTED not in file.name and _kind(file) == "result"]


def _kind(file: Path) -> str:
    """What a file of a folder holds; "" for one that is no value of vdnn's."""
    from vdnn.errors import FormatError

    try:
        return "result" if isinstance(load_value(file), RunResult) else "other"
    except FormatError:
        return ""


def show_pairs(pairs: Sequence[Pair], as_json: bool, figure: Path | None, band: float) -> None:
    """The pairs as a table or JSON, and drawn predicted against measured."""
    from vdnn.cli.arguments import show
    from vdnn.reporting import difference_rows, differences, predictions_table

    if as_json:
        rows = [difference_rows(ours, theirs, differences(ours, theirs)) for ours, theirs in pairs]
        typer.echo(json.dumps(rows, indent=1))
    else:
        show(predictions_table(pairs))
    if figure is not None:
        from vdnn.reporting.plots import prediction_figure, save_figure

        typer.echo(f"Wrote {save_figure(prediction_figure(pairs, band), figure)}", err=True)
