"""Times predicted for rows that the fit did not see: cross-validated by family, and for a GPU that was left out.

    runs/fold-<k>.json         steps: the numbers of a fit without the k-th part of the families, and what they predict
    runs/without-<gpu>.json    a fit without any row of a GPU, and what it predicts for that GPU's rows
    runs/kernels-without-<gpu>.json    the same for single kernels
    runs/whole.json            the fit to everything, and what it predicts for the kernels that it did not see

Each file is written when its fit is done, so that what was broken off goes on there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vdnn.costs.numbers import CostNumbers, Spread
from vdnn.errors import FormatError
from vdnn.fidelity.accuracy import Prediction, Score, by_group, covered, score_of_errors, spread_of
from vdnn.fidelity.captures import Captures
from vdnn.fidelity.fitting import (
    Measured,
    as_mapping,
    fit_numbers,
    folds_by_family,
    kernel_groups,
    predict_kernels,
)
from vdnn.fidelity.memory import judged
from vdnn.fidelity.rows import KERNEL_KINDS, kernel_rows, step_rows
from vdnn.fidelity.steps import Kernels
from vdnn.reporting import provenance
from vdnn.values import hardware

__all__ = [
    "FAMILIES_OUT",
    "FOLDS",
    "Study",
    "coverage_of",
    "fitted_text",
    "intervals_of",
    "kernel_lines",
    "read_predictions",
    "run_study",
    "summaries",
    "summary_lines",
]

FOLDS = 5
FAMILIES_OUT = "families left out"
Tell = Callable[[str, int, int], None]


class Study:
    """The rows of a folder of measurements that have traces, and the fits that predict each without itself."""

    def __init__(self, data: Path, captures: Captures, tell: Tell) -> None:
        self.tell = tell
        rows = self.rows = step_rows(data)
        self.captures = captures
        self.measured = Measured.of(rows, captures, tell)
        self.missing = [row for row in rows if not captures.path(row).exists()]
        self.fitted, self.judged = kernel_groups(kernel_rows(data))
        gpus = [row.gpu for row in self.measured.rows]
        # the GPU with most rows is the one that numbers are fitted to; others are left out, one after the other
        self.home = max(sorted(set(gpus)), key=gpus.count) if gpus else ""
        for row in self.measured.rows:
            if row.kind == "train":
                self.home = row.gpu
        self.at_home = np.array([gpu == self.home for gpu in gpus], dtype=bool)

    @property
    def others(self) -> list[str]:
        """GPUs of steps that are left out of a fit as a whole."""
        return sorted({row.gpu for row in self.measured.rows} - {self.home})

    def jobs(self, folder: Path) -> list[tuple[str, Path, Callable[[], dict[str, Any]]]]:
        """Every fit as (name, file, work)."""
        found = [("fit of everything", folder / "whole.json", self.whole)]
        for gpu in self.others:
            found.append((f"fit without {gpu}", folder / f"without-{gpu}.json", self._without(gpu)))
        if self.at_home.any():
            for fold in range(FOLDS):
                found.append((f"fold {fold + 1} of {FOLDS}", folder / f"fold-{fold}.json", self._fold(fold)))
        for gpu in sorted({k.gpu for k in self.fitted}):
            found.append((f"kernels without {gpu}", folder / f"kernels-without-{gpu}.json", self._kernels_without(gpu)))
        found.append(("memory", folder / "memory.json", lambda: judged(self.rows, self.captures, self.tell)))
        return found

    # -- the fits ------------------------------------------------------------------------------------

    def _fold(self, fold: int) -> Callable[[], dict[str, Any]]:
        def work() -> dict[str, Any]:
            home = [row for row, here in zip(self.measured.rows, self.at_home, strict=True) if here]
            place = np.full(len(self.measured.rows), -1)
            place[self.at_home] = folds_by_family(home, FOLDS)
            numbers = self._fit(self.at_home & (place != fold), self.fitted, f"fold {fold + 1}")
            return self._result(numbers, self._steps(numbers, place == fold, FAMILIES_OUT))

        return work

    def _without(self, gpu: str) -> Callable[[], dict[str, Any]]:
        def work() -> dict[str, Any]:
            there = np.array([row.gpu == gpu for row in self.measured.rows])
            numbers = self._fit(~there, [k for k in self.fitted if k.gpu != gpu], f"without {gpu}")
            return self._result(numbers, self._steps(numbers, there, "GPU left out"))

        return work

    def _kernels_without(self, gpu: str) -> Callable[[], dict[str, Any]]:
        def work() -> dict[str, Any]:
            nothing = np.zeros(len(self.measured.rows), dtype=bool)
            numbers = self._fit(nothing, [k for k in self.fitted if k.gpu != gpu], f"kernels without {gpu}")
            judged = [k for k in self.judged if k.gpu == gpu]
            return {"numbers": as_mapping(numbers), "kernels": self._kernels(numbers, judged, "fit without the GPU")}

        return work

    def whole(self) -> dict[str, Any]:
        """The fit to every step and to the kernels that are fitted."""
        everything = np.ones(len(self.measured.rows), dtype=bool)
        numbers = self._fit(everything, self.fitted, "everything")
        kernels = self._kernels(numbers, self.judged, "rows left out")
        return {"numbers": as_mapping(numbers), "kernels": kernels, "rows_by_file": self._rows_by_file()}

    def _rows_by_file(self) -> dict[str, int]:
        """How many rows of each kind the fit to everything has."""
        counted: dict[str, int] = {}
        for row in self.measured.rows:
            counted[f"{row.kind} {row.gpu}"] = counted.get(f"{row.kind} {row.gpu}", 0) + 1
        counted["fp32 kernels"] = sum(len(k.measured_ns) for k in self.fitted)
        return counted

    def _fit(self, chosen: npt.NDArray[np.bool_], kernels: Sequence[Kernels], name: str) -> CostNumbers:
        return fit_numbers(self.measured, chosen, kernels, progress=lambda what: self.tell(f"{name}: {what}", 0, 0))

    def _result(self, numbers: CostNumbers, predictions: list[Prediction]) -> dict[str, Any]:
        return {"numbers": as_mapping(numbers), "predictions": [asdict(p) for p in predictions]}

    def _steps(self, numbers: CostNumbers, chosen: npt.NDArray[np.bool_], how: str) -> list[Prediction]:
        predicted = self.measured.predicted_ns(numbers)
        names = {"train": "training step", "infer": "forward"}
        return [
            Prediction(
                f"{names[row.kind]}, {hardware(row.gpu).id}",
                how,
                row.gpu,
                row.model,
                row.family,
                row.batch,
                row.measured_ns,
                max(1, round(float(ns))),
            )
            for row, ns, wanted in zip(self.measured.rows, predicted, chosen, strict=True)
            if wanted
        ]

    def _kernels(self, numbers: CostNumbers, judged: Sequence[Kernels], how: str) -> list[dict[str, Any]]:
        """Errors by kind and GPU, in thousandths: rows are many, and only their errors are of interest."""
        found = []
        for k, times in zip(judged, predict_kernels(self.fitted, judged, numbers), strict=True):
            errors = np.round(1000 * (times / k.measured_ns - 1)).astype(int).tolist()
            found.append({"gpu": k.gpu, "kind": k.kind, "how": how, "errors_permille": errors})
        return found


def run_study(study: Study, folder: Path, force: bool, tell: Tell) -> tuple[int, int]:
    """Do the fits that have no file yet; how many were done, and how many were there."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = study.jobs(folder)
    ran = 0
    for number, (name, path, work) in enumerate(jobs):
        if path.exists() and not force:
            continue
        tell(name, number, len(jobs))
        origin = provenance()
        made = {"commit": origin.commit, "vdnn": origin.vdnn}  # the command names folders of the machine
        result = {"provenance": made, "rows": len(study.measured.rows), **work()}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, separators=(",", ":")) + "\n")
        part.replace(path)
        ran += 1
    return ran, len(jobs) - ran


def read_kernel_errors(folder: Path) -> dict[tuple[str, str, str], list[float]]:
    """Errors of kernels by (how they were kept out of the fit, GPU, kind)."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text()).get("kernels", ()):
            found[row["how"], row["gpu"], row["kind"]] = [e / 1000 for e in row["errors_permille"]]
    return found


def read_predictions(folder: Path) -> list[Prediction]:
    """What the fits predicted, from their files."""
    found = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        found += [Prediction(**row) for row in data.get("predictions", ())]
    return found


def summaries(folder: Path) -> dict[tuple[str, str], Score]:
    """Scores by what was predicted and how it was kept out of the fit."""
    found: dict[tuple[str, str], Score] = dict(by_group(read_predictions(folder), lambda p: (p.what, p.how)))
    kernels = read_kernel_errors(folder)
    for how in sorted({how for how, _, _ in kernels}):
        errors = [e for (one, _, _), rows in kernels.items() if one == how for e in rows]
        found["fp32 kernels, all GPUs", how] = score_of_errors(errors)
    return found


def summary_lines(folder: Path) -> list[str]:
    """The same as a Markdown table."""
    lines = [
        "| rows | kept out of the fit | number | median | 90th percentile | bias |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for (what, how), score in summaries(folder).items():
        lines.append(f"| {what} | {how} | {score.rows} | {score.median:.1%} | {score.p90:.1%} | {score.bias:+.1%} |")
    return lines


def kernel_lines(folder: Path, how: str) -> list[str]:
    """Median errors of kernels by kind and GPU, as a Markdown table."""
    kernels = {(gpu, kind): errors for (one, gpu, kind), errors in read_kernel_errors(folder).items() if one == how}
    gpus = sorted({gpu for gpu, _ in kernels})
    lines = [f"| kernel | {' | '.join(gpus)} |", f"| --- |{' ---: |' * len(gpus)}"]
    for kind in KERNEL_KINDS:
        cells = [f"{score_of_errors(kernels[gpu, kind]).median:.1%}" if (gpu, kind) in kernels else "" for gpu in gpus]
        if any(cells):
            lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def intervals_of(predictions: Sequence[Prediction]) -> tuple[Spread, Spread]:
    """The spread on the GPU that numbers are fitted to, and on one that no fit has seen.

    Which way a GPU deviates as a whole is not known before it is measured: the second goes as far up as down, and is no
    narrower than the first.
    """
    known = spread_of([p for p in predictions if p.how == FAMILIES_OUT])
    others = [p for p in predictions if p.how != FAMILIES_OUT]
    if not others:
        return known, known
    spread = spread_of(others)
    factor = max(spread.high, 1 / spread.low, known.high, 1 / known.low)
    return known, Spread(spread.coverage, 1 / factor, factor)


def coverage_of(predictions: Sequence[Prediction]) -> float:
    """How many rows lie in an interval that was made of the other half of the families."""
    half = set(sorted({p.family for p in predictions})[::2])
    one, two = [p for p in predictions if p.family in half], [p for p in predictions if p.family not in half]
    inside = covered(two, spread_of(one)) * len(two) + covered(one, spread_of(two)) * len(one)
    return inside / len(predictions)


def fitted_text(folder: Path, command: str) -> str:
    """The file of fitted numbers, from the fits of a study.

    Raises:
        FormatError: the fit to everything is not there.
    """
    path = folder / "whole.json"
    if not path.exists():
        raise FormatError(f"{path} is not there: the fit to everything has not run")
    whole = json.loads(path.read_text())
    predictions = read_predictions(folder)
    known, unseen = intervals_of(predictions)
    lines = [
        "# Written by `vdnn fit`, never by hand. What each number means: vdnn/costs/numbers.py and docs/costs.md.",
        "",
        "[numbers]",
        *(f"{name} = {value}" for name, value in whole["numbers"].items()),
        "",
        "[intervals] # factors of the predicted time that rows not seen by the fit lie between",
        f"known_gpus = {json.dumps(sorted({p.gpu for p in predictions if p.how == FAMILIES_OUT}))}",
    ]
    for name, spread in (("known", known), ("unseen", unseen)):
        lines += ["", f"[intervals.{name}]", f"coverage = {spread.coverage}"]
        lines += [f"low = {spread.low:.3f}", f"high = {spread.high:.3f}"]
    rows = ", ".join(f"{count} of {name}" for name, count in whole["rows_by_file"].items())
    lines += ["", "[provenance]", f"command = {json.dumps(command)}", f"rows = {json.dumps(rows)}"]
    for (what, how), score in by_group(predictions, lambda p: (p.what, p.how)).items():
        text = f"median {score.median:.1%}, 90th percentile {score.p90:.1%} of {score.rows} rows"
        lines.append(f"{json.dumps(f'{what}, {how}')} = {json.dumps(text)}")
    return "\n".join(lines) + "\n"
