"""Ours beside the paper's: every value that the paper shows, with the tolerance of its figure.

Files are read, never simulated again: `fig11.json` and the others of `results/paper/`.
"""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vdnn.errors import FormatError

__all__ = ["Difference", "Summary", "differences", "published", "read_figure", "summaries"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One value. `tolerance` is relative, or absolute where `absolute` says so; None: not judged."""

    figure: str
    network: str
    what: str
    paper: float
    ours: float
    tolerance: float | None
    absolute: bool = False

    @property
    def size(self) -> float:
        """How far ours is from the paper's: a fraction of the paper's, or the difference itself."""
        if self.absolute:
            return self.ours - self.paper
        return (self.ours - self.paper) / self.paper if self.paper else 0.0

    @property
    def missed(self) -> bool:
        """Whether it is judged, and too far."""
        return self.tolerance is not None and abs(self.size) > self.tolerance

    @property
    def text(self) -> str:
        """The difference for people."""
        return f"{self.size:+.3f}" if self.absolute else f"{100 * self.size:+.1f} %"


@functools.cache
def published() -> dict[str, Any]:
    """The paper's values by figure: {figure: {row: {column: value}}}; `dyn` maps networks to passes."""
    data = tomllib.loads((resources.files("vdnn.reproduction") / "published.toml").read_text())
    found: dict[str, Any] = {}
    for figure, table in data.items():
        if not isinstance(table, dict):
            found[figure] = table
            continue
        columns = table.pop("columns", None)
        found[figure] = (
            table if columns is None else {row: dict(zip(columns, v, strict=True)) for row, v in table.items()}
        )
    return found


def read_figure(folder: Path, name: str) -> Any:
    """A figure's file.

    Raises:
        FormatError: there is none, or it is damaged.
    """
    path = folder / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}; run vdnn experiment experiments/paper.toml") from None
    except ValueError as error:
        raise FormatError(f"{path} is damaged: {error}") from None


def differences(folder: Path) -> list[Difference]:
    """Every published value beside ours, in the order of the figures."""
    found: list[Difference] = []
    found += _rows(folder, "fig1", "Fig. 1", lambda what: None)
    found += _rows(folder, "fig4", "Fig. 4", lambda what: None if what == "workspace_mib" else 0.03)
    found += _rows(folder, "fig5", "Fig. 5", lambda what: None)
    found += _rows(folder, "fig6", "Fig. 6", lambda what: None)
    ours = read_figure(folder, "fig11")
    for network, row in published()["fig11_max"].items():
        for policy, value in row.items():
            tolerance = 0.10 if policy in ("all(m)", "conv(m)", "base(m)") else 0.15
            mine = ours[network][policy]["max_mib"]
            found.append(Difference("Fig. 11 max", network, policy, value, mine, tolerance))
    for network, row in published()["fig11_avg"].items():
        for policy, value in row.items():
            found.append(Difference("Fig. 11 avg", network, policy, value, ours[network][policy]["avg_mib"], 0.15))
    found += _rows(folder, "fig12", "Fig. 12", lambda what: 0.01)
    found += _rows(folder, "fig13", "Fig. 13", lambda what: None)
    ours = read_figure(folder, "fig14")
    for network, row in published()["fig14"].items():
        for policy, value in row.items():
            tolerance = 0.05 if network == "VGG-16(64)" else 0.10
            found.append(Difference("Fig. 14", network, policy, value, ours[network][policy], tolerance, True))
    found += _rows(folder, "fig15", "Fig. 15", {"gpu_mib": 0.10, "cpu_mib": 0.01, "base_mib": None}.__getitem__)
    return found


def _rows(folder: Path, name: str, figure: str, tolerance: Callable[[str], float | None]) -> Iterator[Difference]:
    ours = read_figure(folder, name)
    for row, values in published()[name].items():
        for what, value in values.items():
            yield Difference(figure, row, what, value, ours[row][what], tolerance(what))


@dataclass(frozen=True, slots=True)
class Summary:
    """One figure: of its `values`, `judged` have a tolerance and `within` of those keep it; `worst` is a fraction.

    The worst is of those that are judged, if any is; `worst_text` has its unit (an absolute one is no per cent).
    """

    figure: str
    values: int
    judged: int
    within: int
    worst: float
    worst_text: str
    network: str
    what: str


def summaries(found: Sequence[Difference]) -> list[Summary]:
    """How far each figure is reproduced."""
    figures: dict[str, list[Difference]] = {}
    for d in found:
        figures.setdefault(d.figure, []).append(d)
    rows = []
    for figure, members in figures.items():
        judged = [d for d in members if d.tolerance is not None]
        worst = max(judged or members, key=lambda d: abs(d.size))
        within = sum(not d.missed for d in judged)
        rows.append(
            Summary(figure, len(members), len(judged), within, worst.size, worst.text, worst.network, worst.what)
        )
    return rows
