"""Errors of predictions: by group, by family, the worst, and the spread that intervals are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vdnn.costs.numbers import Spread

__all__ = ["Prediction", "Score", "by_group", "covered", "score_of", "score_of_errors", "spread_of", "worst"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A measured row beside what was predicted for it without it.

    `what` names the group ("training, RTX 3090"), `how` how the row was kept out of the fit.
    """

    what: str
    how: str
    gpu: str
    name: str
    family: str
    batch: int
    measured_ns: int
    predicted_ns: int

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_ns / self.measured_ns - 1


@dataclass(frozen=True, slots=True)
class Score:
    """Errors of a group: the median and the 90th percentile of their sizes, and the median with its sign."""

    rows: int
    median: float
    p90: float
    bias: float


def score_of(predictions: Iterable[Prediction]) -> Score:
    """The score of some predictions, of which there must be one."""
    return score_of_errors([p.error for p in predictions])


def score_of_errors(found: Sequence[float]) -> Score:
    """The score of errors, each predicted over measured, less one."""
    errors = np.array(found)
    size = np.abs(errors)
    return Score(len(errors), float(np.median(size)), float(np.quantile(size, 0.9)), float(np.median(errors)))


def by_group(predictions: Sequence[Prediction], key: Callable[[Prediction], Any]) -> dict[Any, Score]:
    """Scores by a key, in its order."""
    groups: dict[Any, list[Prediction]] = {}
    for p in predictions:
        groups.setdefault(key(p), []).append(p)
    return {name: score_of(groups[name]) for name in sorted(groups)}


def worst(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """The predictions that are off by the largest factor, either way."""
    return sorted(predictions, key=lambda p: -abs(np.log(p.predicted_ns / p.measured_ns)))[:count]


def spread_of(predictions: Sequence[Prediction], coverage: float = 0.9) -> Spread:
    """Between which factors of the predicted time so many of the measured ones lie, as many below as above."""
    factors = np.array([p.measured_ns / p.predicted_ns for p in predictions])
    low, high = np.quantile(factors, [(1 - coverage) / 2, (1 + coverage) / 2])
    return Spread(coverage, float(low), float(high))


def covered(predictions: Sequence[Prediction], spread: Spread) -> float:
    """Which part of the measured times lies in the interval."""
    inside = [spread.low <= p.measured_ns / p.predicted_ns <= spread.high for p in predictions]
    return sum(inside) / len(inside)
