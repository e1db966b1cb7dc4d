"""The page of the fidelity experiment: tables and figures, from the files of its runs alone."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from vdnn.fidelity.accuracy import Prediction, by_group, spread_of, worst
from vdnn.fidelity.memory import memory_lines
from vdnn.fidelity.times import (
    FAMILIES_OUT,
    coverage_of,
    kernel_lines,
    read_predictions,
    summary_lines,
)

__all__ = ["fidelity_lines", "readme_lines"]

WORST = 10


def fidelity_lines(folder: Path) -> list[str]:
    """Tables, the worst with their reasons, figures (which are drawn)."""
    from vdnn.reporting import plots

    runs = folder / "runs"
    predictions = read_predictions(runs)
    lines = ["## How far predictions are off", "", *readme_lines(folder), ""]
    if predictions:
        groups: dict[str, list[tuple[float, float]]] = {}
        families: dict[str, list[float]] = {}
        for p in predictions:
            groups.setdefault(f"{p.what}: {p.how}", []).append((p.measured_ns / 1e6, p.predicted_ns / 1e6))
            if p.how == FAMILIES_OUT:
                families.setdefault(p.family, []).append(p.error)
        plots.save_figure(plots.accuracy_figure(groups), folder / "predicted.png")
        lines += ["![Predicted against measured times of steps that no fit had seen](predicted.png)", ""]
        lines += ["## Intervals", "", *_intervals(predictions), ""]
        for (what, how), _ in by_group(predictions, lambda p: (p.what, p.how)).items():
            chosen = [p for p in predictions if (p.what, p.how) == (what, how)]
            lines += [f"## The worst of {what}, {how}", "", *_worst(chosen), ""]
        if families:
            plots.save_figure(plots.families_figure(families), folder / "families.png")
            lines += [
                "## By family",
                "",
                "![Errors by family of models](families.png)",
                "",
                *_families(predictions),
                "",
            ]
    memory = memory_lines(runs)
    if memory:
        lines += ["## Does it fit?", "", *memory, ""]
    for how in ("rows left out", "fit without the GPU"):
        table = kernel_lines(runs, how)
        if len(table) > 2:
            lines += [f"## Single fp32 kernels, {how}: median error", "", *table, ""]
    return lines


def readme_lines(folder: Path) -> list[str]:
    """The table of errors."""
    return summary_lines(folder / "runs")


def _intervals(predictions: Sequence[Prediction]) -> list[str]:
    lines = [
        "Factors of the predicted time between which 90 % of the measured ones lie; checked with intervals that were",
        "made of the other half of the families. For a GPU that no fit has seen the wider side is taken both ways.",
        "",
        "| rows | from | to | measured times inside |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, chosen in (
        ("families left out", [p for p in predictions if p.how == FAMILIES_OUT]),
        ("GPU left out", [p for p in predictions if p.how != FAMILIES_OUT]),
    ):
        if len({p.family for p in chosen}) > 1:
            spread = spread_of(chosen)
            lines.append(f"| {name} | {spread.low:.2f} | {spread.high:.2f} | {coverage_of(chosen):.0%} |")
    return lines


def _worst(predictions: Sequence[Prediction]) -> list[str]:
    lines = [
        "| model | batch | measured [ms] | predicted [ms] | error | probably because of |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for p in worst(predictions, WORST):
        times = f"{p.measured_ns / 1e6:.0f} | {p.predicted_ns / 1e6:.0f} | {p.error:+.0%}"
        lines.append(f"| {p.name} | {p.batch} | {times} | {reason_of(p)} |")
    return lines


def _families(predictions: Sequence[Prediction]) -> list[str]:
    lines = ["| family | rows | median | bias |", "| --- | ---: | ---: | ---: |"]
    chosen = [p for p in predictions if p.how == FAMILIES_OUT]
    scores = by_group(chosen, lambda p: p.family)
    for family, score in sorted(scores.items(), key=lambda item: -item[1].median):
        lines.append(f"| {family} | {score.rows} | {score.median:.1%} | {score.bias:+.1%} |")
    return lines


def reason_of(prediction: Prediction) -> str:
    """Why a prediction is probably off: the first reason of `reasons.toml` whose pattern the model's name fits."""
    data = tomllib.loads((resources.files("vdnn.fidelity") / "reasons.toml").read_text())
    for reason in data["reason"]:
        way = reason.get("way", "")
        here = re.search(reason["model"], prediction.name) and re.search(reason.get("rows", ""), prediction.what)
        if here and (not way or (way == "over") == (prediction.error > 0)):
            return str(reason["text"]).strip()
    return "not known"
