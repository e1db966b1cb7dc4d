"""The step under a plan as a list of instructions in the order the host issues them.

Between two ops stand the plan's actions, in the engine's order: at a pack the copy out, then releases; at an
unpack the storage's own fetch, then prefetches in plan order, then waits. The simulator only follows the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vdnn.analysis.moments import Moment, Move

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

    def put(moment: Moment | None, kind: int, rank: int, move: int) -> None:
        if moment is not None:
            found.append(Action(moment[0], moment[1], rank, moves[move].entry, move, kind))

    for i, move in enumerate(moves):
        put(move.out, OUT, _RANK[OUT], i)
        put(move.release, RELEASE, _RANK[RELEASE], i)
        put(move.fetch, FETCH, 0 if move.on_demand else _RANK[FETCH], i)
        put(move.wait, ARRIVE, _RANK[ARRIVE], i)
        put(move.need, WAIT, _RANK[WAIT], i)
    found.sort()
    return found
