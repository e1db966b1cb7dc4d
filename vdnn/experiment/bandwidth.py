"""A sweep over the link's bandwidth as a figure and a table: where offload is free, and from which link on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vdnn.experiment.extra import sweep_file
from vdnn.experiment.spec import Sweep
from vdnn.reporting.sheet import Column, Sheet, as_text

__all__ = ["draw_sweep", "free_from"]

# A slowdown up to this is called free.
FREE = 1.05
WIDTH = 130


def free_from(points: list[list[float]]) -> float | None:
    """The least of the bandwidths from which on every slowdown is free; None if even the largest is not."""
    found = None
    for link, slowdown in sorted(points, reverse=True):
        if slowdown > FREE:
            break
        found = link
    return found


def draw_sweep(sweep: Sweep, folder: Path) -> list[str]:
    """Draw the figure, a panel a GPU and precision; the page's lines about it."""
    from vdnn.reporting.plots import Line, bandwidth_figure, save_figure

    data: dict[tuple[str, str], Any] = {}
    for model, batch, _ in sweep.models:
        for precision in sweep.precisions:
            name = f"{model.partition(':')[2]} ({batch})"
            data[name, precision] = json.loads(sweep_file(folder, model, batch, precision).read_text())["gpus"]
    path = Path(sweep.file)
    lines, rows = [f"## {sweep.title}", "", *([sweep.text.strip(), ""] if sweep.text.strip() else [])], []
    for precision in sweep.precisions:
        panels = []
        for gpu in sweep.gpus:
            found = {name: gpus[gpu] for (name, given), gpus in data.items() if given == precision}
            drawn = [Line(name, tuple((x, y) for x, y in n["slowdowns"])) for name, n in found.items()]
            panels.append((f"{gpu}, {precision}", drawn))
            rows += [_row(name, gpu, precision, n) for name, n in found.items()]
        file = f"{path.stem}-{precision}{path.suffix}"
        save_figure(bandwidth_figure(panels), folder / file)
        lines += [f"![{sweep.caption}]({file})", "", f"{precision}: {sweep.caption}", ""]
    headers = ("network", "GPU", "", "step ms", "offload GiB", "peak GiB", "without", "fits", "own link", "slowdown")
    columns = tuple(Column(h, i < 3) for i, h in enumerate((*headers, "free from")))
    table = as_text(Sheet("", columns, tuple(rows), keys=3), width=WIDTH)
    return [*lines, "```", *table.rstrip().splitlines(), "```", ""]


def _row(name: str, gpu: str, precision: str, numbers: Any) -> tuple[str, ...]:
    free = free_from(numbers["slowdowns"])
    without = f"{numbers['baseline_peak_gib']:.1f}"
    fits = f"{'yes' if numbers['fits'] else 'no'}/{'yes' if numbers['baseline_fits'] else 'no'}"
    return (
        name,
        gpu,
        precision,
        f"{numbers['iteration_ms']:.1f}",
        f"{numbers['offloaded_gib']:.2f}",
        f"{numbers['peak_gib']:.1f}",
        without,
        fits,
        f"{numbers['own_link_gb_per_s']:.1f} GB/s",
        f"{numbers['own_slowdown']:.2f}",
        "--" if free is None else f"{free:g} GB/s",
    )
