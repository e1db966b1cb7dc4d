"""Plans for budgets as tables and figures: how far from the bound, beside the policies, and how long it takes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from vdnn.experiment.extra import frontier_file
from vdnn.experiment.frontier import WORSE, Frontier
from vdnn.reporting.sheet import Column, Sheet, as_text

__all__ = ["draw_frontier"]

WIDTH = 150
_GIB = 2**30
OVERHEAD = 0.2  # at which published planners say by how much activations shrink
_PARTS = {  # of vdnn.planner.GapParts
    "fragments_ns": "fragments",
    "again_ns": "again",
    "storages_ns": "storages",
    "copies_ns": "copies",
}
_MEANING = (
    "The parts are differences of bounds that know more and more of the plan, the last of them the simulated step",
    "(`vdnn/planner/gaps.py`). *fragments*: the allocator holds more than is requested, so the plan has less than",
    "the bound. *again*: whole modules and blocks run again, with memory of their own, where the bound computes any",
    "storage again for its ops' time, from whatever it takes. *storages*: what is offloaded goes whole. *copies*: they",
    "start at program points, take a latency, and are waited for.",
)


def draw_frontier(frontier: Frontier, folder: Path) -> list[str]:
    """Draw the figures; the page's lines about them. Models that have not run yet are left out, and counted."""
    from vdnn.reporting.plots import growth_figure, pareto_figure, save_figure

    data: dict[tuple[str, str], Any] = {}
    missing = 0
    names = Counter((model.partition(":")[2], batch) for model, batch, _ in frontier.models)
    for model, batch, _ in frontier.models:
        name = model.partition(":")[2]
        name = model if names[name, batch] > 1 else name  # one network of two sources
        for gpu in frontier.gpus:
            path = frontier_file(folder, frontier, model, batch, gpu)
            if path.exists():
                data[f"{name} ({batch})", gpu] = json.loads(path.read_text())
            else:
                missing += 1
    lines = [f"## {frontier.title}", "", *([frontier.text.strip(), ""] if frontier.text.strip() else [])]
    if missing:
        lines += [f"{missing} of {missing + len(data)} pairs of model and GPU have not run yet.", ""]
    if not data:
        return lines
    path = Path(frontier.file)
    shown = {key: d for key, d in data.items() if not frontier.shown or d["model"] in frontier.shown}
    save_figure(pareto_figure([(f"{name}, {gpu}", d) for (name, gpu), d in shown.items()]), folder / path.name)
    lines += [f"![{frontier.caption}]({path.name})", "", frontier.caption, ""]
    growth = f"{path.stem}-time{path.suffix}"
    points = [(d["ops"], b["cpu_seconds"]) for d in data.values() for b in d["budgets"].values()]
    save_figure(growth_figure(points), folder / growth)
    lines += [f"![CPU time of planning]({growth})", "", "CPU time of one plan against the ops of the step.", ""]
    for table in (_summary(frontier, data), _table(frontier, data), _least(frontier, data), _shrunk(data)):
        lines += ["```", *as_text(table, width=WIDTH).rstrip().splitlines(), "```", ""]
    return [*lines, *_worse(data)]


def _gap(budget: Any) -> float:
    return float(budget["time_ns"] / max(budget["bound_ns"], 1) - 1)


def _summary(frontier: Frontier, data: dict[tuple[str, str], Any]) -> Sheet:
    """Gaps by budget, over all models and GPUs."""
    rows = []
    for percent in [*map(str, frontier.percents), "all"]:
        cells = [b for d in data.values() for p, b in d["budgets"].items() if percent in (p, "all")]
        gaps = sorted(_gap(b) for b in cells)
        if not gaps:
            continue
        slower = sum(min(b["policies"].values(), default=b["time_ns"]) < b["time_ns"] for b in cells)
        faster = [min(b["policies"].values()) / b["time_ns"] for b in cells if b["policies"]]
        rows.append(
            (
                percent if percent == "all" else f"{percent} %",
                str(len(gaps)),
                f"{100 * median(gaps):.1f}",
                f"{100 * gaps[len(gaps) * 9 // 10]:.1f}",
                f"{100 * gaps[-1]:.1f}",
                str(sum(gap > WORSE for gap in gaps)),
                str(slower),
                f"{median(faster):.2f}×" if faster else "--",
                f"{max(b['cpu_seconds'] for b in cells):.1f}",
            )
        )
    headers = (
        "budget",
        "plans",
        "gap % median",
        "p90",
        "worst",
        "over 20 %",
        "a policy is faster",
        "best policy",
        "CPU s",
    )
    return Sheet("gap to the bound", tuple(Column(h, i < 1) for i, h in enumerate(headers)), tuple(rows), keys=1)


def _table(frontier: Frontier, data: dict[tuple[str, str], Any]) -> Sheet:
    rows = []
    for (name, gpu), d in data.items():
        cells = []
        for percent in map(str, frontier.percents):
            b = d["budgets"].get(percent)
            if b is None:
                cells.append("--")
                continue
            mark = "*" if b["blocks"] else ""
            cells.append(f"{b['time_ns'] / d['time_ns']:.2f}{mark} {100 * _gap(b):.1f}")
        rows.append((name, gpu, f"{d['baseline_bytes'] / _GIB:.1f}", f"{d['least_bytes'] / _GIB:.2f}", *cells))
    headers = ("network", "GPU", "own GiB", "least", *(f"{p} %" for p in frontier.percents))
    return Sheet(
        "slowdown and gap in % at each budget; * with the blocks recomputed",
        tuple(Column(h, i < 2) for i, h in enumerate(headers)),
        tuple(rows),
        keys=2,
    )


def _least(frontier: Frontier, data: dict[tuple[str, str], Any]) -> Sheet:
    """The least budgets, against each policy's."""
    rows = []
    for name in frontier.policies:
        ratios = [d["policies"][name]["least_bytes"] / d["least_bytes"] for d in data.values() if name in d["policies"]]
        if ratios:
            rows.append(
                (
                    name,
                    str(len(ratios)),
                    f"{median(ratios):.2f}×",
                    f"{min(ratios):.2f}×",
                    str(sum(ratio < 0.995 for ratio in ratios)),
                    str(sum(ratio > 1.005 for ratio in ratios)),
                )
            )
    headers = ("policy", "pairs", "its least to ours, median", "least", "needs less than ours", "needs more")
    return Sheet("least budget", tuple(Column(h, i < 1) for i, h in enumerate(headers)), tuple(rows), keys=1)


def _shrunk(data: dict[tuple[str, str], Any]) -> Sheet:
    """By how much activations shrink at the least budget of those here that costs no more than a fifth of the time."""
    rows = []
    for (name, gpu), d in data.items():
        cheap = [b for b in d["budgets"].values() if b["time_ns"] <= (1 + OVERHEAD) * d["time_ns"]]
        if "resident_bytes" not in d or not cheap:
            continue
        best = min(cheap, key=lambda b: (b["peak_requested_bytes"], b["time_ns"]))
        stays = d["resident_bytes"]
        own, left = d["requested_bytes"] - stays, best["peak_requested_bytes"] - stays
        reserved = (d["baseline_bytes"] - stays) / (best["peak_reserved_bytes"] - stays)
        rows.append(
            (
                *(name, gpu, f"{own / _GIB:.2f}", f"{left / _GIB:.2f}", f"{own / left:.1f}×", f"{reserved:.1f}×"),
                f"{100 * (best['time_ns'] / d['time_ns'] - 1):.0f}",
                f"{100 * (best['bound_ns'] / d['time_ns'] - 1):.0f}",
            )
        )
    headers = ("network", "GPU", "own GiB", "left GiB", "smaller", "reserved", "overhead %", "bound %")
    title = f"activations, workspaces and all else but what stays, at an overhead of at most {100 * OVERHEAD:.0f} %"
    return Sheet(title, tuple(Column(h, i < 2) for i, h in enumerate(headers)), tuple(rows), keys=2)


def _worse(data: dict[tuple[str, str], Any]) -> Sequence[str]:
    """Each gap beyond a fifth, and what it is made of."""
    rows = []
    for (name, gpu), d in data.items():
        for percent, b in d["budgets"].items():
            parts = b.get("gap")
            if _gap(b) > WORSE:
                shares = (
                    [f"{100 * parts[key] / b['bound_ns']:.0f}" for key in _PARTS] if parts else ["--"] * len(_PARTS)
                )
                rows.append((name, gpu, f"{percent} %", f"{100 * _gap(b):.0f}", *shares))
    if not rows:
        return [f"No gap is beyond {100 * WORSE:.0f} %.", ""]
    headers = ("network", "GPU", "budget", "gap %", *_PARTS.values())
    title = f"gaps beyond {100 * WORSE:.0f} %, and their parts, in % of the bound"
    table = Sheet(title, tuple(Column(h, i < 2) for i, h in enumerate(headers)), tuple(rows), keys=2)
    return ["```", *as_text(table, width=WIDTH).rstrip().splitlines(), "```", "", *_MEANING, ""]
