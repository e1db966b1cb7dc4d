"""The look of every figure, in one place: colours, hatches, markers, fonts and sizes.

Colours are those of Okabe and Ito, which people with any of the common colour blindnesses tell apart; hatches
and markers say the same once more, so that a print in black and white reads as well. No matplotlib here.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "BAND",
    "CAPACITY",
    "CATEGORY_LOOKS",
    "CAUSE_LOOKS",
    "FIT_LOOK",
    "HALF_HEIGHT",
    "KEPT",
    "NO_FIT_LOOK",
    "OFFLOADED",
    "PHASE_LOOKS",
    "RC",
    "STALL_LOOK",
    "STREAM_LOOKS",
    "WIDTH",
    "Look",
    "category_look",
    "marker_look",
]

BLACK = "#000000"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
YELLOW = "#F0E442"
BLUE = "#0072B2"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
GREY = "#9A9A9A"
PALE = "#E6E6E6"

# Inches: as wide as the text of a page, and half of a square of it high.
WIDTH = 7.2
HALF_HEIGHT = 2.6


@dataclass(frozen=True, slots=True)
class Look:
    """How one kind of thing is drawn: an area (colour and hatch) or a point (colour and marker)."""

    label: str
    colour: str
    hatch: str = ""
    marker: str = "o"


CATEGORY_LOOKS = {
    "parameter": Look("parameters", BLUE),
    "buffer": Look("buffers", BLACK),
    "optimizer_state": Look("optimizer state", PURPLE, "////"),
    "gradient": Look("gradients", YELLOW, "...."),
    "input": Look("input", GREEN, "xxxx"),
    "activation": Look("feature maps", SKY),
    "temporary": Look("temporaries", ORANGE, "\\\\\\\\"),
}
PHASE_LOOKS = {
    "forward": Look("forward", BLUE),
    "backward": Look("backward", SKY),
    "optimizer": Look("optimizer", PURPLE),
}
STREAM_LOOKS = {
    "offload": Look("offload (D2H)", ORANGE),
    "prefetch": Look("prefetch (H2D)", GREEN),
    "communication": Look("all-reduce", YELLOW, "...."),
}
# A stall is an empty box in its stream: nothing runs there. The hatch says what it waits for.
CAUSE_LOOKS = {
    "release": Look("stall: release", VERMILION, "/////"),
    "prefetch": Look("stall: prefetch", GREEN, "\\\\\\\\\\"),
    "fetch": Look("stall: fetch on demand", BLACK, "xxxxx"),
    "layer": Look("stall: end of layer", PURPLE, "|||||"),
    "all-reduce": Look("stall: all-reduce", YELLOW, "-----"),
    "launch": Look("stall: launch", GREY, "....."),
}
OFFLOADED = Look("offloaded", ORANGE)
KEPT = Look("kept", "#C8C8C8", "////")
FIT_LOOK = Look("fits", SKY)
NO_FIT_LOOK = Look("does not fit", PALE, "xxxx")
STALL_LOOK = Look("stalls", VERMILION, "/////")
CAPACITY = VERMILION
BAND = PALE

_MARKERS = "osD^vP*X<>hp"
_POINT_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)


def category_look(category: str) -> Look:
    """The look of a memory category; one that is not known is grey."""
    return CATEGORY_LOOKS.get(category) or Look(category.replace("_", " "), GREY, "++++")


def marker_look(label: str, number: int) -> Look:
    """The look of the `number`-th kind of point in a scatter plot."""
    return Look(label, _POINT_COLOURS[number % len(_POINT_COLOURS)], "", _MARKERS[number % len(_MARKERS)])


RC: dict[str, object] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "grid.color": "#D8D8D8",
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "patch.linewidth": 0.5,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.hashsalt": "vdnn",
    "pdf.fonttype": 42,
}
