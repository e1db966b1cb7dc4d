"""The paper's figures, drawn from the files of `results/paper/` with the paper's own bars beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vdnn.reproduction.differences import Difference, published, read_figure
from vdnn.reproduction.networks import DEEP, POLICIES

__all__ = ["DRAWN", "draw_figures"]

# Figure's file and what it shows.
DRAWN = {
    "fig1": "Fig. 1: memory of the baseline, and the share of it that the largest layer needs.",
    "fig4": "Fig. 4: the baseline's memory by what it is for.",
    "fig5": "Fig. 5: VGG-16(256) by layer, fastest algorithms: feature maps X + Y, workspace, weights.",
    "fig6": "Fig. 6: VGG-16(64) by layer: times of the fastest algorithms, and the reuse distance of X.",
    "fig9": "Fig. 9: streams and stalls of VGG-16(64) under all(p); below, the first layers of forward.",
    "fig11": "Fig. 11: maximum (wide bars) and average (narrow) memory by policy.",
    "fig12": "Fig. 12: bytes offloaded in one iteration.",
    "fig13": "Fig. 13: DRAM bandwidth that CONV layers of VGG-16(64) use.",
    "fig14": "Fig. 14: performance of the feature extraction layers against base(p).",
    "fig15": "Fig. 15: very deep networks under all(p): GPU and CPU memory, and the baseline's.",
}


def draw_figures(folder: Path, stalls: Path) -> list[str]:
    """Draw what there are files for; names of the pictures, in order."""
    from vdnn.reporting import plots
    from vdnn.values import RunResult, load

    drawn: dict[str, Any] = {
        "fig1": _by_network(folder, "fig1", {"total_mib": "baseline [MiB]", "largest_layer_percent": "largest [%]"}),
        "fig4": _stacked(folder, "fig4", ("weights", "feature maps", "gradient maps", "workspace")),
        "fig11": _memory(folder),
        "fig12": _by_network(folder, "fig12", {"all_mib": "all [MiB]", "conv_mib": "conv [MiB]"}),
        "fig14": _performance(folder),
        "fig15": _stacked(folder, "fig15", ("GPU", "CPU (pinned)")),
    }
    titles = {"maps_mib": "X + Y [MiB]", "workspace_mib": "workspace [MiB]", "weights_mib": "weights [MiB]"}
    titles |= {"forward_ms": "forward [ms]", "backward_ms": "backward [ms]", "reuse_ms": "reuse distance [ms]"}
    titles |= {"forward_gb_per_s": "forward [GB/s]", "backward_gb_per_s": "backward [GB/s]"}
    for name in ("fig5", "fig6", "fig13"):
        if (folder / f"{name}.json").exists():
            columns = next(iter(published()[name].values()))
            drawn[name] = _by_network(folder, name, {c: titles[c] for c in columns})
    if stalls.exists():
        result = load(stalls, "result")
        assert isinstance(result, RunResult)
        drawn["fig9"] = plots.streams_figure(result, (0, (result.forward_time_ns or 0) * 11 // 20))
    for name in DRAWN:
        if name in drawn:
            plots.save_figure(drawn[name], folder / f"{name}.png")
    return [name for name in DRAWN if name in drawn]


def _text(paper: float, ours: float, absolute: bool = False) -> str:
    return Difference("", "", "", paper, ours, None, absolute).text


def _by_network(folder: Path, name: str, titles: dict[str, str]) -> Any:
    """A panel a column, a pair of bars a row; very deep networks apart, so that the others are seen."""
    from vdnn.reporting.plots import Bars, Panel, pairs_figure

    ours, paper = read_figure(folder, name), published()[name]
    panels = []
    for column, title in titles.items():
        for deep in (False, True):
            bars = []
            for row, values in ours.items():
                if (row in DEEP) is deep:
                    there = paper[row][column] if row in paper else None
                    bars.append(Bars(row, values[column], there, "" if there is None else _text(there, values[column])))
            if bars:
                panels.append(Panel(title, tuple(bars)))
    return pairs_figure(panels, "", len(panels), 3.6 * len(panels), 2.9)


def _memory(folder: Path) -> Any:
    from vdnn.reporting.plots import Bars, Panel, pairs_figure

    ours, most, average = read_figure(folder, "fig11"), published()["fig11_max"], published()["fig11_avg"]
    panels = []
    for network, row in ours.items():
        bars = []
        for label in POLICIES:
            there = most.get(network, {}).get(label)
            mean = average.get(network, {}).get(label)
            words = "" if there is None else _text(there, row[label]["max_mib"])
            bars.append(Bars(label, row[label]["max_mib"], there, words, row[label]["avg_mib"], mean))
        panels.append(Panel(network, tuple(bars)))
    return pairs_figure(panels, "memory [MiB]", 5, 13, 2.6, second=True)


def _performance(folder: Path) -> Any:
    from vdnn.reporting.plots import Bars, Panel, pairs_figure

    ours, paper = read_figure(folder, "fig14"), published()["fig14"]
    panels = []
    for network, row in ours.items():
        bars = []
        for label in POLICIES:
            there = paper.get(network, {}).get(label)
            bars.append(Bars(label, row[label], there, "" if there is None else _text(there, row[label], True)))
        panels.append(Panel(network, tuple(bars)))
    return pairs_figure(panels, "against base(p)", 5, 13, 2.4)


def _stacked(folder: Path, name: str, parts: Sequence[str]) -> Any:
    """Columns of the file as parts of a bar, as many as there are names; a further one is a mark over it."""
    from vdnn.reporting.plots import Stack, stacked_figure

    ours, paper = read_figure(folder, name), published()[name]
    panels: list[list[Stack]] = [[], []]
    for row, values in ours.items():
        mine = list(values.values())
        theirs = list(paper[row].values()) if row in paper else None
        words = "" if theirs is None else _text(sum(theirs[: len(parts)]), sum(mine[: len(parts)]))
        panels[row in DEEP].append(Stack(row, mine, theirs, words))
    return stacked_figure(parts, [p for p in panels if p], "memory [MiB]", "baseline")
