"""Times predicted for rows that the fit did not see: cross-validated by family, and for a GPU that was left out.

    runs/fold-<k>.json         steps: the numbers of a fit without the k-th part of the families, and what they predict
    runs/without-<gpu>.json    a fit without any row of a GPU, and what it predicts for that GPU's rows
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
from vdnn.fidelity.accuracy import Prediction, by_group, covered, score_of, spread_of
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
from vdnn.fidelity.rows import kernel_rows, step_rows
from vdnn.fidelity.steps import Kernels
from vdnn.reporting import provenance
from vdnn.values import hardware

__all__ = ["FOLDS", "Study", "read_predictions"]

FOLDS = 5
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
        found: list[tuple[str, Path, Callable[[], dict[str, Any]]]] = []
        if self.at_home.any():
            for fold in range(FOLDS):
                found.append((f"fold {fold + 1} of {FOLDS}", folder / f"fold-{fold}.json", self._fold(fold)))
        for gpu in self.others:
            found.append((f"fit without {gpu}", folder / f"without-{gpu}.json", self._without(gpu)))
        for gpu in sorted({k.gpu for k in self.fitted}):
            found.append((f"kernels without {gpu}", folder / f"kernels-without-{gpu}.json", self._kernels_without(gpu)))
        found.append(("fit of everything", folder / "whole.json", self.whole))
        found.append(("memory", folder / "memory.json", lambda: judged(self.rows, self.captures, self.tell)))
        return found

    # -- the fits ------------------------------------------------------------------------------------

    def _fold(self, fold: int) -> Callable[[], dict[str, Any]]:
        def work() -> dict[str, Any]:
            home = [row for row, here in zip(self.measured.rows, self.at_home, strict=True) if here]
            place = np.full(len(self.measured.rows), -1)
            place[self.at_home] = folds_by_family(home, FOLDS)
            numbers = self._fit(self.at_home & (place != fold), self.fitted, f"fold {fold + 1}")
            return self._result(numbers, self._steps(numbers, place == fold, "families left out"))

        return work

    def _without(self, gpu: str) -> Callable[[], dict[str, Any]]:
        def work() -> dict[str, Any]:
            there = np.array([row.gpu == gpu for row in self.measured.rows])
            numbers = self._fit(~there, [k for k in self.fitted if k.gpu != gpu], f"without {gpu}")
            return self._result(numbers, self._steps(numbers, there, f"fit without {gpu}"))

        return work

    def _kernels_without(self, gpu: str) -> Callable[[], dict[str, Any]]:
        def work() -> dict[str, Any]:
            nothing = np.zeros(len(self.measured.rows), dtype=bool)
            numbers = self._fit(nothing, [k for k in self.fitted if k.gpu != gpu], f"kernels without {gpu}")
            judged = [k for k in self.judged if k.gpu == gpu]
            return self._result(numbers, self._kernels(numbers, judged, f"fit without {gpu}"))

        return work

    def whole(self) -> dict[str, Any]:
        """The fit to every step and to the kernels that are fitted."""
        everything = np.ones(len(self.measured.rows), dtype=bool)
        numbers = self._fit(everything, self.fitted, "everything")
        return self._result(numbers, self._kernels(numbers, self.judged, "rows left out"))

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

    def _kernels(self, numbers: CostNumbers, judged: Sequence[Kernels], how: str) -> list[Prediction]:
        found = []
        for k, times in zip(judged, predict_kernels(self.fitted, judged, numbers), strict=True):
            for measured, ns in zip(k.measured_ns, times, strict=True):
                found.append(
                    Prediction(
                        f"fp32 kernel, {k.gpu}", how, k.gpu, k.kind, k.kind, 0, int(measured), max(1, round(float(ns)))
                    )
                )
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
        made = {"command": origin.command, "commit": origin.commit, "vdnn": origin.vdnn}
        result = {"provenance": made, "rows": len(study.measured.rows), **work()}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, separators=(",", ":")) + "\n")
        part.replace(path)
        ran += 1
    return ran, len(jobs) - ran


def read_predictions(folder: Path) -> list[Prediction]:
    """What the fits predicted, from their files."""
    found = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        found += [Prediction(**row) for row in data.get("predictions", ())]
    return found


def summary_lines(predictions: Sequence[Prediction]) -> list[str]:
    """Scores by what was predicted and how, as a Markdown table."""
    lines = [
        "| rows | kept out of the fit by | number | median | 90th percentile | bias |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for (what, how), score in by_group(predictions, lambda p: (p.what, p.how)).items():
        lines.append(f"| {what} | {how} | {score.rows} | {score.median:.1%} | {score.p90:.1%} | {score.bias:+.1%} |")
    return lines


def intervals_of(predictions: Sequence[Prediction], home: str) -> tuple[Spread, Spread]:
    """The spread on the GPU that numbers are fitted to, and on one that was left out."""
    steps = [p for p in predictions if not p.what.startswith("fp32")]
    known = [p for p in steps if p.gpu == home]
    unseen = [p for p in steps if p.gpu != home] or known
    return spread_of(known), spread_of(unseen)


def coverage_of(predictions: Sequence[Prediction], home: str) -> list[tuple[str, float]]:
    """How many rows lie in an interval that was made of the other half of the families."""
    found = []
    for name, rows in (
        (home, [p for p in predictions if p.gpu == home and not p.what.startswith("fp32")]),
        ("others", [p for p in predictions if p.gpu != home and not p.what.startswith("fp32")]),
    ):
        families = sorted({p.family for p in rows})
        half = set(families[::2])
        one, two = [p for p in rows if p.family in half], [p for p in rows if p.family not in half]
        if one and two:
            inside = covered(two, spread_of(one)) * len(two) + covered(one, spread_of(two)) * len(one)
            found.append((name, inside / len(rows)))
    return found


def _overall(predictions: Sequence[Prediction]) -> float:
    return score_of(predictions).median
