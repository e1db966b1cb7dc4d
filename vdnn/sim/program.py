"""The step under a plan as a list of instructions in the order the host issues them.

Between two ops stand the plan's actions, in the engine's order: at a pack the copy out, then releases; at an
unpack the storage's own fetch, then prefetches in plan order, then waits. The simulator only follows the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vdnn.analysis.moments import Move

__all__ = ["ARRIVE", "FETCH", "OUT", "RELEASE", "WAIT", "Action", "actions"]

OUT, RELEASE, FETCH, WAIT, ARRIVE = range(5)
# what comes first at one moment: ARRIVE is the wait that a plan puts before the need, WAIT the need itself
_RANK = {OUT: 0, RELEASE: 1, FETCH: 1, ARRIVE: 2, WAIT: 3}


class Action(NamedTuple):
    """Something other than an op, before the op at `position`; `move` indexes the moves."""

    position: int
    order: int
    rank: int
    entry: int
    move: int
    kind: int


def actions(moves: Sequence[Move]) -> list[Action]:
    """Every action of the moves, in program order."""
    found = []
    for i, move in enumerate(moves):
        entry = move.entry
        found.append(Action(*move.out, _RANK[OUT], entry, i, OUT))
        found.append(Action(*move.release, _RANK[RELEASE], entry, i, RELEASE))
        if move.fetch is not None:
            found.append(Action(*move.fetch, 0 if move.on_demand else _RANK[FETCH], entry, i, FETCH))
        if move.wait is not None:
            found.append(Action(*move.wait, _RANK[ARRIVE], entry, i, ARRIVE))
        if move.need is not None:
            found.append(Action(*move.need, _RANK[WAIT], entry, i, WAIT))
    found.sort()
    return found
