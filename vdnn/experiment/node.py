"""A node's GPUs on shared links as a figure and a table: what offload costs where several copy over one link."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vdnn.experiment.extra import node_file
from vdnn.experiment.spec import NodeSweep
from vdnn.reporting.sheet import Column, Sheet, as_text

__all__ = ["draw_node"]

WIDTH = 130


def draw_node(nodes: NodeSweep, folder: Path) -> list[str]:
    """Draw the figure, a panel a model and GPU; the page's lines about it."""
    from vdnn.reporting.plots import Line, node_figure, save_figure

    panels, rows = [], []
    for model, batch, _ in nodes.models:
        for gpu in nodes.gpus:
            data = json.loads(node_file(folder, nodes, model, batch, gpu).read_text())
            name = f"{model.partition(':')[2]} ({batch})"
            lines = [
                Line(policy, tuple((step["gpus_per_link"], step["slowdown"]) for step in steps))
                for policy, steps in data["policies"].items()
            ]
            panels.append((f"{name}, {nodes.ranks} × {gpu}", lines))
            rows += [_row(name, gpu, policy, steps, data["alone_ns"]) for policy, steps in data["policies"].items()]
    save_figure(node_figure(panels, columns=len(nodes.gpus)), folder / nodes.file)
    counts = [f"{count} a link" for count in nodes.per_link]
    headers = ("network", "GPU", "policy", "alone ms", *counts, "peak GiB", "pinned GiB", "fits")
    columns = tuple(Column(h, i < 3) for i, h in enumerate(headers))
    table = as_text(Sheet("", columns, tuple(rows), keys=3), width=WIDTH)
    return [
        *(f"## {nodes.title}", ""),
        *([nodes.text.strip(), ""] if nodes.text.strip() else []),
        *(f"![{nodes.caption}]({nodes.file})", "", nodes.caption, ""),
        *("```", *table.rstrip().splitlines(), "```", ""),
    ]


def _row(name: str, gpu: str, policy: str, steps: list[Any], alone_ns: int) -> tuple[str, ...]:
    fits = {step["fits"] for step in steps}
    return (
        *(name, gpu, policy, f"{alone_ns / 1e6:.1f}"),
        *(f"{step['slowdown']:.2f}×" for step in steps),
        " … ".join(dict.fromkeys(f"{step['peak_requested_bytes'] / 2**30:.1f}" for step in (steps[0], steps[-1]))),
        " … ".join(dict.fromkeys(f"{step['pinned_bytes'] / 2**30:.0f}" for step in (steps[0], steps[-1]))),
        "yes" if fits == {True} else "no" if fits == {False} else "in part",
    )
