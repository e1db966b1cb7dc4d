"""The page of the reproduction: a table a figure, every miss with its reason, and the README's summary."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from vdnn.errors import UsageError
from vdnn.reporting.sheet import Column, Sheet, as_text
from vdnn.reproduction.differences import Difference, differences, published, read_figure, summaries
from vdnn.reproduction.drawing import DRAWN, draw_figures
from vdnn.reproduction.figures import write_files
from vdnn.reproduction.networks import POLICIES

__all__ = ["BEGIN", "END", "readme_table", "reason_of", "reproduction_lines", "write_figures", "write_readme"]

BEGIN, END = "<!-- reproduction: begin -->", "<!-- reproduction: end -->"
WIDTH = 130


def write_figures(folder: Path, runs: Sequence[Path]) -> list[str]:
    """Write the figures' files and pictures from the run files; the page's lines about them."""
    numbers = {}
    for path in runs:
        data = json.loads(path.read_text())
        numbers[data["network"]] = data
    write_files(folder, numbers)
    drawn = draw_figures(folder, folder / "runs" / "paper-stalls.json.gz")
    return reproduction_lines(folder, drawn)


def reproduction_lines(folder: Path, drawn: Sequence[str]) -> list[str]:
    """Summary, misses, `dyn`, and each figure with its table."""
    found = differences(folder)
    lines = ["## What was fitted, and what is predicted", "", _text("fitted"), ""]
    lines += ["## How far from the paper", "", *_summary(found), ""]
    misses = [d for d in found if d.missed]
    judged = sum(d.tolerance is not None for d in found)
    lines += [f"## Misses: {len(misses)} of {judged} values that are judged", ""]
    groups: dict[str, list[Difference]] = {}
    for d in misses:
        groups.setdefault(reason_of(d), []).append(d)
    for reason, members in groups.items():
        lines += [f"* {reason}", *(f"  * {_said(d)}" for d in members)]
    lines += ["", "## What `vdnn-dyn` chose", "", *_dyn(folder), ""]
    lines += ["## Figures", ""]
    for name in drawn:
        lines += [f"### {DRAWN[name]}", "", f"![{DRAWN[name]}]({name}.png)", ""]
        rows = [d for d in found if _file_of(d) == name]
        if rows:
            lines += ["```", as_text(_sheet(rows), width=WIDTH).rstrip(), "```", ""]
        if _text(name):
            lines += [_text(name), ""]
    return [*lines, "## Power", "", _text("power"), ""]


def readme_table(folder: Path) -> str:
    """Figure, values, worst difference and where, as a Markdown table."""
    return "\n".join(_summary(differences(folder)))


def write_readme(folder: Path, readme: Path) -> None:
    """Put the table between the two marks of a README.

    Raises:
        UsageError: the README has no such marks.
    """
    text = readme.read_text()
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise UsageError(f"{readme} has no lines {BEGIN!r} and {END!r}: put them where the table shall be")
    table = f"{BEGIN}\n{readme_table(folder)}\n{END}"
    readme.write_text(pattern.sub(lambda match: table, text))


# -- parts ---------------------------------------------------------------------------------------


def _summary(found: Sequence[Difference]) -> list[str]:
    lines = [
        "| figure | values | within tolerance | worst difference | where |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for row in summaries(found):
        inside = f"{row.within} of {row.judged}" if row.judged else "not judged"
        where = f"{row.network}, {_name(row.what)}"
        lines.append(f"| {row.figure} | {row.values} | {inside} | {row.worst_text} | {where} |")
    return lines


def _sheet(rows: Sequence[Difference]) -> Sheet:
    columns = (Column("", True), Column("", True), Column("paper"), Column("ours"), Column("difference"), Column(""))
    cells = []
    for d in rows:
        digits = 3 if d.absolute else (0 if d.paper >= 100 else 1)
        verdict = "" if d.tolerance is None else "missed" if d.missed else "within"
        what = f"{_name(d.what)} ({d.figure.rpartition(' ')[2]})" if "11" in d.figure else _name(d.what)
        cells.append((d.network, what, f"{d.paper:.{digits}f}", f"{d.ours:.{digits}f}", d.text, verdict))
    return Sheet("", columns, tuple(cells), keys=2)


def _dyn(folder: Path) -> list[str]:
    chosen, log, bars = read_figure(folder, "dyn"), read_figure(folder, "dyn_log"), published()["dyn"]
    lines = ["| network | by the paper's text, on our numbers | the paper's bars show |", "| --- | --- | --- |"]
    lines += [f"| {n} | {c} | {bars.get(n, '--')} |" for n, c in chosen.items()]
    lines += ["", _text("dyn"), ""]
    for network in ("VGG-16(128)", "VGG-16(256)", "VGG-116(32)"):
        if network in log:
            lines += [f"{network}:", "", "```", *log[network], "```", ""]
    return lines


def _said(d: Difference) -> str:
    digits = 3 if d.absolute else 0
    where = f"{d.figure}, {d.network}, {_name(d.what)}"
    return f"{where}: paper {d.paper:.{digits}f}, ours {d.ours:.{digits}f} ({d.text})"


def _name(what: str) -> str:
    return what if what in POLICIES else what.removesuffix("_mib").replace("_", " ")


def _file_of(d: Difference) -> str:
    return f"fig{d.figure.split()[1]}"


def _texts() -> dict[str, str]:
    data = tomllib.loads((resources.files("vdnn.reproduction") / "words.toml").read_text())
    return {name: text.strip() for name, text in data["text"].items()}


def _text(name: str) -> str:
    return _texts().get(name, "")


def reason_of(d: Difference) -> str:
    """Why a value is missed: the first reason of `words.toml` whose patterns it fits."""
    data = tomllib.loads((resources.files("vdnn.reproduction") / "words.toml").read_text())
    for reason in data["reason"]:
        if all(re.fullmatch(reason.get(name, ".*"), getattr(d, name)) for name in ("figure", "network", "what")):
            return str(reason["text"].strip())
    return "No reason is known."
