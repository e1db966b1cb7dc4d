"""The numbers that reports show, each computed once: text, JSON and figures render what is here.

    result_rows(results)       the JSON rows: one a result, the baseline's under "baseline", and what follows from both
    comparisons(results)       the same as values: slowdown and saving against the baseline
    differences(p, m)          prediction beside measurement, with what explains the difference
    peak_parts(result)         what fills the peak, and what of it offload cannot lower

The baseline of a result is the run without offload (policy "none") of the same model, batch, GPU, precision
and source. None stands for "not known" everywhere, and never for zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vdnn.units import format_bytes
from vdnn.values import RunResult

__all__ = [
    "BASELINE",
    "CATEGORIES",
    "COLUMNS",
    "Comparison",
    "Difference",
    "PeakPart",
    "baseline_of",
    "by_category",
    "comparisons",
    "difference_rows",
    "differences",
    "peak_of",
    "peak_parts",
    "result_row",
    "result_rows",
]

BASELINE = "none"
COLUMNS = (
    "model",
    "batch",
    "gpu",
    "policy",
    "precision",
    "source",
    "peak_requested_bytes",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "iteration_time_ns",
    "stall_ns",
    "offloaded_bytes",
    "prefetched_bytes",
    "host_peak_bytes",
    "fits",
    "iteration_time_low_ns",
    "iteration_time_high_ns",
)
Level = Literal["requested", "allocated", "reserved"]
LEVELS: tuple[Level, ...] = ("requested", "allocated", "reserved")

# In the order in which a figure stacks them, from what stays to what passes; and why offload leaves them alone.
CATEGORIES: dict[str, tuple[str, str]] = {
    "parameter": ("parameters", "weights stay on the device; sharding (FSDP) lowers them"),
    "buffer": ("buffers", "part of the model, stay on the device"),
    "optimizer_state": ("optimizer state", "stays on the device; sharding or an 8-bit optimizer lowers it"),
    "gradient": ("gradients", "as large as the weights; sharding or a fused optimizer step lowers them"),
    "input": ("input", "held by the training loop"),
    "activation": ("feature maps", ""),
    "temporary": ("temporaries", "workspaces and gradients of feature maps of the running op"),
}


def result_row(result: RunResult) -> dict[str, Any]:
    """One result as a JSON row, without comparison."""
    return {name: getattr(result, name) for name in COLUMNS}


def result_rows(results: Sequence[RunResult], baseline: RunResult | None = None) -> list[dict[str, Any]]:
    """JSON rows of results: the columns, `slowdown`, the saving, and the baseline's columns under `baseline`."""
    return [
        {
            **result_row(c.result),
            "slowdown": c.slowdown,
            "saving_of": c.saving_of,
            "saving_bytes": c.saving_bytes,
            "saving_percent": c.saving_percent,
            "baseline": None if c.baseline is None else result_row(c.baseline),
        }
        for c in comparisons(results, baseline)
    ]


def peak_of(result: RunResult, level: Level) -> int | None:
    """The peak on one of the three levels of memory."""
    peak: int | None = getattr(result, f"peak_{level}_bytes")
    return peak


@dataclass(frozen=True, slots=True)
class Comparison:
    """A result beside its baseline. `saving_of` is the level of memory that is compared: requested first."""

    result: RunResult
    baseline: RunResult | None
    slowdown: float | None
    saving_of: Level | None
    saving_bytes: int | None
    saving_percent: float | None

    @property
    def is_baseline(self) -> bool:
        """Whether the result is its own baseline."""
        return self.result == self.baseline


def baseline_of(result: RunResult, results: Iterable[RunResult]) -> RunResult | None:
    """The run without offload that a result compares with, if it is among `results`."""

    def setting(r: RunResult) -> tuple[object, ...]:
        return (r.model, r.batch, r.gpu, r.precision, r.source)

    return next((r for r in results if r.policy == BASELINE and setting(r) == setting(result)), None)


def comparisons(results: Sequence[RunResult], baseline: RunResult | None = None) -> tuple[Comparison, ...]:
    """Each result beside `baseline`, or beside its own among `results`."""
    return tuple(_compare(r, baseline if baseline is not None else baseline_of(r, results)) for r in results)


def _compare(result: RunResult, baseline: RunResult | None) -> Comparison:
    slowdown = None
    if baseline is not None and result.iteration_time_ns is not None and baseline.iteration_time_ns:
        slowdown = result.iteration_time_ns / baseline.iteration_time_ns
    if baseline is not None:
        for level in LEVELS:
            own, other = peak_of(result, level), peak_of(baseline, level)
            if own is not None and other:
                return Comparison(result, baseline, slowdown, level, other - own, 100 * (other - own) / other)
    return Comparison(result, baseline, slowdown, None, None, None)


# -- what fills the peak -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeakPart:
    """A share of the peak. `lowered` tells whether offload can lower it, `why` says why not."""

    category: str
    label: str
    module: str
    nbytes: int
    percent: float
    lowered: bool
    why: str


def peak_parts(result: RunResult) -> tuple[PeakPart, ...]:
    """What fills the peak, largest first; parts of one category and module are summed."""
    sums: dict[tuple[str, str], int] = {}
    for item in result.peak_items:
        key = (item.category, item.module)
        sums[key] = sums.get(key, 0) + item.nbytes
    total = sum(sums.values())
    ordered = sorted(sums.items(), key=lambda pair: (-pair[1], pair[0]))
    return tuple(_part(category, module, nbytes, total) for (category, module), nbytes in ordered)


def by_category(result: RunResult) -> tuple[PeakPart, ...]:
    """What fills the peak, by category alone, in the order of `CATEGORIES`."""
    sums: dict[str, int] = {}
    for item in result.peak_items:
        sums[item.category] = sums.get(item.category, 0) + item.nbytes
    total = sum(sums.values())
    known = [c for c in CATEGORIES if c in sums]
    return tuple(_part(c, "", sums[c], total) for c in known + sorted(set(sums) - set(known)))


def _part(category: str, module: str, nbytes: int, total: int) -> PeakPart:
    label, why = CATEGORIES.get(category, (category.replace("_", " "), "not a saved feature map"))
    percent = 100 * nbytes / total if total else 0.0
    return PeakPart(category, label, module, nbytes, percent, category == "activation", why)


# -- prediction beside measurement ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Difference:
    """One quantity, predicted and measured; `difference` is measured minus predicted, `percent` of the prediction."""

    quantity: str
    label: str
    predicted: int | None
    measured: int | None
    difference: int | None
    percent: float | None
    explanation: str


QUANTITIES: dict[str, str] = {
    "peak_requested_bytes": "peak requested",
    "peak_allocated_bytes": "peak allocated",
    "peak_reserved_bytes": "peak reserved",
    "offloaded_bytes": "offloaded",
    "prefetched_bytes": "prefetched",
    "host_peak_bytes": "pinned host peak",
    "iteration_time_ns": "iteration time",
    "stall_ns": "stalls",
}


def differences(
    predicted: RunResult, measured: RunResult, explanations: Mapping[str, str] | None = None
) -> tuple[Difference, ...]:
    """Every quantity that either run knows, with what explains the difference.

    `explanations` maps a quantity ("iteration_time_ns") to words of the caller, who may know more. Otherwise a
    difference in requested memory is explained by the categories that differ at the two peaks.
    """
    found = []
    for quantity, label in QUANTITIES.items():
        ours: int | None = getattr(predicted, quantity)
        theirs: int | None = getattr(measured, quantity)
        if ours is None and theirs is None:
            continue
        difference = None if ours is None or theirs is None else theirs - ours
        percent = 100 * difference / ours if difference is not None and ours else None
        if explanations is not None and quantity in explanations:
            explanation = explanations[quantity]
        else:
            explanation = _explain(quantity, difference, predicted, measured)
        found.append(Difference(quantity, label, ours, theirs, difference, percent, explanation))
    return tuple(found)


def difference_rows(predicted: RunResult, measured: RunResult, found: Sequence[Difference]) -> dict[str, Any]:
    """The JSON form of `differences`."""
    names = ("quantity", "predicted", "measured", "difference", "percent", "explanation")
    return {
        "predicted": result_row(predicted),
        "measured": result_row(measured),
        "differences": [{name: getattr(d, name) for name in names} for d in found],
    }


def _explain(quantity: str, difference: int | None, predicted: RunResult, measured: RunResult) -> str:
    if difference is None:
        return "not predicted" if getattr(predicted, quantity) is None else "not measured"
    if difference == 0:
        return "equal"
    if quantity != "peak_requested_bytes" or not predicted.peak_items or not measured.peak_items:
        return ""
    ours = {part.category: part for part in by_category(predicted)}
    theirs = {part.category: part for part in by_category(measured)}
    changes = []
    for category in dict.fromkeys([*ours, *theirs]):
        change = (theirs[category].nbytes if category in theirs else 0) - (
            ours[category].nbytes if category in ours else 0
        )
        if change:
            label = (ours.get(category) or theirs[category]).label
            changes.append((abs(change), f"{label} {'+' if change > 0 else '-'}{format_bytes(abs(change))}"))
    return ", ".join(text for _, text in sorted(changes, reverse=True))
