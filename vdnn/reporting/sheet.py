"""`Sheet`: a table that never loses a digit, however narrow the terminal.

A table whose columns do not fit side by side is printed in several blocks, one below the other, each with
the columns that name its rows; a word that is too long goes on in the next line. Nothing is cut off.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = ["Column", "Sheet", "as_text", "stacked"]

_GAP = 2
_LEAST_WORDS = 16


@dataclass(frozen=True, slots=True)
class Column:
    """A column; `words` columns are left-aligned and may go on in the next line, numbers never do."""

    header: str
    words: bool = False


@dataclass(frozen=True, slots=True)
class Sheet:
    """A titled table with notes below; the first `keys` columns name the rows. `marked` rows are printed bold."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    marked: frozenset[int] = frozenset()
    keys: int = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(self.title, style="bold")
        for n, block in enumerate(self._blocks(options.max_width)):
            if n:
                yield Text("")
            yield self._table(block)
        for note in self.notes:
            yield Padding(Text(note, style="dim"), (0, 0, 0, 1))

    def _natural(self, i: int) -> int:
        cells = [line for cell in (self.columns[i].header, *(r[i] for r in self.rows)) for line in cell.split("\n")]
        return max((len(line) for line in cells), default=0)

    def _least(self, i: int) -> int:
        return min(self._natural(i), _LEAST_WORDS) if self.columns[i].words else self._natural(i)

    def _blocks(self, width: int) -> list[list[int]]:
        """Column numbers by block: as many as fit beside those that name the rows."""
        blocks: list[list[int]] = [[]]
        names = sum(self._least(i) + _GAP for i in range(self.keys)) - _GAP
        used = names
        for i in range(self.keys, len(self.columns)):
            need = self._least(i) + _GAP
            if blocks[-1] and used + need > width:
                blocks.append([])
                used = names
            blocks[-1].append(i)
            used += need
        return blocks

    def _table(self, block: Sequence[int]) -> Table:
        shown = (*range(self.keys), *block)
        table = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            header_style="bold",
            show_header=any(self.columns[i].header for i in shown),
        )
        for i in shown:
            column = self.columns[i]
            table.add_column(
                Text(column.header),
                justify="left" if column.words else "right",
                overflow="fold",
                min_width=self._least(i),
            )
        for n, row in enumerate(self.rows):
            table.add_row(*(Text(row[i]) for i in shown), style="bold" if n in self.marked else "")
        return table


def as_text(what: RenderableType, width: int = 100) -> str:
    """A report as plain text of at most `width` columns, without colours or trailing blanks."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False, force_terminal=False)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).rstrip() + "\n"


def stacked(*parts: RenderableType) -> Group:
    """Reports one below the other, with an empty line between."""
    lines: list[RenderableType] = []
    for part in parts:
        lines += [part] if not lines else [Text(""), part]
    return Group(*lines)
