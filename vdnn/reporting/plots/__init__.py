"""Figures of traces, plans and results; the only place in vdnn that loads matplotlib.

Each function takes values and returns a `matplotlib.figure.Figure`; `save_figure` writes it, equal figures as
equal bytes. Nothing here touches pyplot, so figures can be drawn in any thread and in any program.
"""

from vdnn.reporting.plots.accuracy import accuracy_figure, families_figure
from vdnn.reporting.plots.bandwidth import Line, bandwidth_figure
from vdnn.reporting.plots.beside import Bars, Panel, Stack, pairs_figure, stacked_figure
from vdnn.reporting.plots.canvas import save_figure
from vdnn.reporting.plots.layers import layers_figure
from vdnn.reporting.plots.memory import memory_figure
from vdnn.reporting.plots.node import node_figure
from vdnn.reporting.plots.pareto import advice_figure, growth_figure, pareto_figure
from vdnn.reporting.plots.policies import policies_figure
from vdnn.reporting.plots.prediction import prediction_figure
from vdnn.reporting.plots.streams import streams_figure

__all__ = [
    "Bars",
    "Line",
    "Panel",
    "Stack",
    "accuracy_figure",
    "advice_figure",
    "bandwidth_figure",
    "families_figure",
    "growth_figure",
    "layers_figure",
    "memory_figure",
    "node_figure",
    "pairs_figure",
    "pareto_figure",
    "policies_figure",
    "prediction_figure",
    "save_figure",
    "stacked_figure",
    "streams_figure",
]
