"""Figures without pyplot: drawn in vdnn's style whatever the reader's own settings, saved without a date.

Equal values give equal files, so a figure under version control changes only when its numbers do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vdnn.errors import UsageError
from vdnn.reporting.style import RC, WIDTH, Look

__all__ = ["area", "box_of", "legend_above", "new_figure", "patch", "save_figure", "styled"]

P = ParamSpec("P")
R = TypeVar("R")

# The field in which each format keeps the date or the version of matplotlib; None leaves it out.
_METADATA: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    ".svg": {"Date": None, "Creator": None},
}


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(cast(Any, RC))
        yield


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw in vdnn's style, and leave matplotlib's settings as they were."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with _style():
            return draw(*args, **kwargs)

    return drawn


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure on an Agg canvas; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def area(look: Look) -> dict[str, Any]:
    """Keywords of an area with that look; the hatch is drawn in the colour of the edge."""
    if not look.hatch:
        return {"facecolor": look.colour, "edgecolor": "none", "linewidth": 0}
    return {"facecolor": look.colour, "edgecolor": "#333333", "hatch": look.hatch, "linewidth": 0}


def box_of(look: Look) -> dict[str, Any]:
    """Keywords of an empty box, hatched in the colour of that look."""
    return {"facecolor": "white", "edgecolor": look.colour, "hatch": look.hatch, "linewidth": 0.5}


def legend_above(figure: Figure, handles: list[Any], columns: int = 4) -> None:
    """A legend above all axes, outside of the data."""
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=min(columns, len(handles)))


def patch(look: Look, label: str = "", boxed: bool = False) -> Patch:
    """The legend's sample of an area."""
    return Patch(label=label or look.label, **(box_of(look) if boxed else area(look)))


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, PDF or SVG, by the name's ending; equal figures give equal bytes.

    Raises:
        UsageError: the name ends otherwise.
    """
    path = Path(path)
    if path.suffix not in _METADATA:
        raise UsageError(f"cannot write a figure to {path.name!r}: the name must end in {', '.join(_METADATA)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _style():
        figure.savefig(path, metadata=_METADATA[path.suffix])
    return path
