"""Offloaded bytes by layer: where a model's feature maps are, and which of them a plan moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from vdnn.errors import UsageError
from vdnn.reporting.plots.canvas import area, legend_above, new_figure, patch, styled
from vdnn.reporting.scale import byte_scale
from vdnn.reporting.style import HALF_HEIGHT, KEPT, OFFLOADED, WIDTH
from vdnn.reporting.summaries import layer_shares
from vdnn.units import format_bytes
from vdnn.values import Plan, Trace

__all__ = ["layers_figure"]

# A label takes this many inches of the axis; with more layers than fit, only every n-th is named.
_LABEL = 0.13
_MOST_BARS = 100


@styled
def layers_figure(plan: Plan, trace: Trace) -> Figure:
    """A bar a layer, in the order of forward: bytes of feature maps that are offloaded, and that are kept.

    Raises:
        UsageError: a trace that saves no feature maps.
    """
    shares = layer_shares(plan, trace)
    if not shares:
        raise UsageError(f"the trace of {trace.model!r} saves no feature maps")
    size = byte_scale(share.kept_bytes + share.offloaded_bytes for share in shares)
    offloaded = np.array([share.offloaded_bytes for share in shares])
    kept = np.array([share.kept_bytes for share in shares])
    figure = new_figure(HALF_HEIGHT + 0.8)
    axes = figure.subplots()
    low, high = offloaded / size.divisor, (offloaded + kept) / size.divisor
    kept_look = KEPT
    if len(shares) <= _MOST_BARS:
        x = np.arange(len(shares))
        axes.bar(x, low, 0.8, **area(OFFLOADED))
        axes.bar(x, high - low, 0.8, bottom=low, **area(KEPT))
    else:
        # One outline for all layers: bars this thin have no room for gaps or hatches.
        kept_look = dataclasses.replace(KEPT, hatch="")
        edges = np.arange(len(shares) + 1) - 0.5
        axes.stairs(low, edges, fill=True, **area(OFFLOADED))
        axes.stairs(high, edges, baseline=low, fill=True, **area(kept_look))
    named, labels = thin_labels([share.layer for share in shares], int((WIDTH - 0.7) / _LABEL))
    axes.set_xticks(named, labels, rotation=90, fontsize=7)
    axes.tick_params(axis="x", length=2)
    axes.set_xlim(-0.7, len(shares) - 0.3)
    axes.set_ylabel(f"feature maps [{size.unit}]")
    axes.set_xlabel("layer, in the order of forward")
    axes.grid(axis="y")
    told = f"{OFFLOADED.label}: {format_bytes(int(offloaded.sum()))}"
    legend_above(figure, [patch(OFFLOADED, told), patch(kept_look, f"{KEPT.label}: {format_bytes(int(kept.sum()))}")])
    return figure


def thin_labels(names: Sequence[str], most: int) -> tuple[list[int], list[str]]:
    """Which layers to name, at most `most` of them evenly, and how: a first call without its number."""
    step = -(-len(names) // most)
    chosen = list(range(0, len(names), step))
    return chosen, [names[i].removesuffix("#0") for i in chosen]
