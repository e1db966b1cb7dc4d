"""No plan is faster: a linear program that every plan's step satisfies, so its optimum is a bound from below.

    variables   f_i, g_i    how much of storage i goes to the host, how much is computed again (f + g <= 1)
                h_o         how much of a forward op runs a second time, for ops that make several storages
                b_j         for how much of a storage a code stands, or how much of a block runs a second time, where a
                            search asks for it (f + g + b <= 1)
                X_k         when compute starts the op at breakpoint k
                W_k         time of what was computed again by then
                T_k, J_k    bytes that have gone out, and come back, by then
    minimise    X at the end of the step

    time        X_k - X_(k-1) >= the ops between + W_k - W_(k-1) + codes made there;  X_k >= its time without a plan
    again       W_k >= what is computed again of all that is needed by then: sooner it may be, in backward
    link        T_k - T_(k-1) <= d2h (X_k - X_(k-1)), the same for J, and both together <= what they share
    order       T_k <= packed so far;  needed so far <= J_k <= T_k
    memory      live_k - (gone out and released) + come back - dropped <= budget, while each op runs

It is a bound because it only leaves things out: transfers may be partial and start at any time, what a storage is
computed again from is there for nothing, a code takes no memory, no allocator rounds, no kernel launch is late, no copy
has a latency. It has a row for each breakpoint and its sums are written as recurrences (cumulative rows
take HiGHS minutes instead of a second). Breakpoints are the positions where something is packed, let go, or needed;
beyond `_MOST` of them neighbours are merged, which again only leaves things out: packs and releases move to the
beginning of their stretch, needs to its end.

A budget binds reserved memory; requested bytes are never more than that, so the bound holds for it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from vdnn.analysis.liveness import requested
from vdnn.planner.pieces import Group, Piece, codes, least_memory, pieces
from vdnn.sim.run import clock
from vdnn.values.hardware import Hardware
from vdnn.values.trace import Trace

__all__ = ["Bound", "Group", "Piece", "least_memory", "pieces", "time_bound"]

_MOST = 900  # breakpoints
_SAFETY = 1e-6  # HiGHS meets its rows to about this share


@dataclass(frozen=True, slots=True)
class Bound:
    """No plan's step is shorter than `time_ns`; `why` says how it was found, `solved` whether it was.

    `out` and `again` are the shares of each piece that the optimum moves and computes again, by storage; `groups` those
    of the groups that run again, by their number.
    """

    time_ns: int
    why: str
    solved: bool
    out: dict[int, float]
    again: dict[int, float]
    groups: dict[int, float] = field(default_factory=dict)


def time_bound(
    trace: Trace,
    hardware: Hardware,
    op_ns: Sequence[int],
    budget_bytes: int,
    *,
    items: Sequence[Piece] | None = None,
    seconds: float = 20.0,
    breakpoints: int = 0,
    groups: Sequence[Group] | None = None,
    forced: bool = False,
) -> Bound:
    """The bound on the step's time with this much memory.

    Args:
        items: what may be away; default: everything that could (only then it is a bound for every plan).
        breakpoints: how many there may be; 0: as many as a second or two allow.
        groups: what may also come again together, for a search; default: the codes that there are.
        forced: every one of `items` goes to the host, as a whole.
        seconds: for the solver. If they do not suffice, the bound is the step without a plan, and says so.
    """
    base = clock(trace, op_ns, hardware)
    live = requested(trace)
    found = list(pieces(trace)) if items is None else list(items)
    if max(live, default=0) <= budget_bytes:
        return Bound(base[-1], "the step fits as it is", True, {}, {})
    if groups is None:
        groups = codes(trace, hardware, found) if items is None else ()
    program = _Program(trace, hardware, op_ns, base, live, budget_bytes, found, breakpoints or _MOST, groups, forced)
    status, value, out, again, whole = program.solve(seconds)
    if status == 2:
        return Bound(base[-1], "no plan fits", True, {}, {})
    if status != 0:
        return Bound(base[-1], f"the solver gave up after {seconds:g} s: the step without a plan", False, {}, {})
    bound = max(base[-1], math.floor(value * (1 - _SAFETY)))
    return Bound(bound, f"linear program of {program.rows} rows and {program.columns} columns", True, out, again, whole)


class _Program:
    """The rows and columns, in thousandths of the peak and of the step: HiGHS likes numbers near 1."""

    def __init__(
        self,
        trace: Trace,
        hardware: Hardware,
        op_ns: Sequence[int],
        base: Sequence[int],
        live: Sequence[int],
        budget: int,
        items: list[Piece],
        breakpoints: int,
        groups: Sequence[Group],
        forced: bool,
    ) -> None:
        self.items = items
        self.groups = groups
        self.byte = max(live) / 1000
        self.ns = max(base[-1], 1) / 1000
        self._entries: tuple[list[int], list[int], list[float]] = ([], [], [])
        self._upper: list[float] = []
        self._equal: list[bool] = []
        self._low: list[float] = []
        self._high: list[float | None] = []
        self._cost: list[float] = []
        self.points = _breakpoints(len(op_ns), live, budget, items, breakpoints)
        work = list(accumulate(op_ns, initial=0))
        at = self.points
        last = len(at) - 1
        out = [self._column(int(forced), 1) for _ in items]
        again = [self._column(0, 0 if piece.again is None else 1) for piece in items]
        whole = [self._column(0, 1) for _ in groups]
        makers: dict[int, list[int]] = {}
        for number, group in enumerate(groups):
            for storage in group.storages:
                makers.setdefault(storage, []).append(number)
        for piece, f, g in zip(items, out, again, strict=True):
            self._row([(f, 1), (g, 1), *((whole[j], 1) for j in makers.get(piece.storage, ()))], 1)
        time = [self._column(base[p] / self.ns, None) for p in at]
        sent = [self._column(0, None) for _ in at]
        back = [self._column(0, None) for _ in at]
        self._cost[time[last]] = 1

        packed: list[list[tuple[int, float]]] = [[] for _ in at]
        gone: list[list[tuple[int, float]]] = [[] for _ in at]
        needed: list[list[tuple[int, float]]] = [[] for _ in at]
        absent: list[list[tuple[int, float]]] = [[] for _ in at]  # what changes in what is away without the link
        costs: list[list[tuple[int, float]]] = [[] for _ in at]
        made: list[list[tuple[int, float]]] = [[] for _ in at]
        shared: dict[int, list[int]] = {}
        for i, piece in enumerate(items):
            for op in piece.again or ():
                shared.setdefault(op, []).append(i)
        for i, piece in enumerate(items):
            begin, end = bisect_right(at, piece.gone) - 1, min(bisect_left(at, piece.need), last)
            away, moved = piece.nbytes / self.byte, piece.moved / self.byte
            packed[bisect_right(at, piece.pack) - 1].append((out[i], moved))
            gone[begin].append((out[i], moved))
            needed[end].append((out[i], moved))
            absent[begin].append((again[i], away))
            absent[end].append((again[i], -away))
            if moved < away:  # saved views that cover less than their storage: the rest does not come back
                absent[begin].append((out[i], away - moved))
                absent[min(bisect_left(at, piece.free), last)].append((out[i], moved - away))
            for j in makers.get(piece.storage, ()):
                first = bisect_right(at, max(piece.gone, groups[j].gone)) - 1
                absent[first].append((whole[j], away))
                absent[max(first, min(bisect_left(at, groups[j].need), last))].append((whole[j], -away))
            alone = piece.again_ns + sum(op_ns[op] for op in piece.again or () if len(shared[op]) == 1)
            if alone:
                costs[end].append((again[i], alone / self.ns))
        for group, b in zip(groups, whole, strict=True):
            costs[min(bisect_left(at, group.need), last)].append((b, group.ns / self.ns))
            made[bisect_left(at, group.at)].append((b, group.made_ns / self.ns))
        for op, users in shared.items():
            if len(users) > 1 and op_ns[op]:
                twice = self._column(0, 1)
                for i in users:
                    self._row([(again[i], 1), (twice, -1)], 0)
                ends = max(min(bisect_left(at, items[i].need), last) for i in users)
                costs[ends].append((twice, op_ns[op] / self.ns))

        rates = [r * self.ns / self.byte / 1e9 for r in (hardware.d2h_bytes_per_s, hardware.h2d_bytes_per_s)]
        both = hardware.duplex_bytes_per_s * self.ns / self.byte / 1e9
        sums = [self._recurrence(part) for part in (packed, gone, needed, absent)]
        first = min((piece.need for piece in items), default=0)
        ran = [self._column(0, None if p >= first else 0) for p in at]  # W_k - W_(k-1)
        early = [self._column(0, None) for _ in at]  # what of it is not needed yet
        for k, due in enumerate(costs):
            before = [(early[k - 1], 1.0)] if k else []
            self._row([*before, (ran[k], 1), (early[k], -1), *_minus(due)], 0, equal=True)
        for k in range(last + 1):
            if k:
                step = [(time[k - 1], 1.0), (time[k], -1.0)]
                self._row([*step, (ran[k], 1), *made[k]], -(work[at[k]] - work[at[k - 1]]) / self.ns)
                went, came = [(sent[k], 1.0), (sent[k - 1], -1.0)], [(back[k], 1.0), (back[k - 1], -1.0)]
                self._row([*went, *((c, v * rates[0]) for c, v in step)], 0)
                self._row([*came, *((c, v * rates[1]) for c, v in step)], 0)
                if both < sum(rates):
                    self._row([*went, *came, *((c, v * both) for c, v in step)], 0)
            self._row([(sent[k], 1), *_minus(sums[0][k])], 0)
            self._row([*sums[2][k], (back[k], -1)], 0)
            self._row([(back[k], 1), (sent[k], -1)], 0)
            if k < last:
                here = live[at[k]]
                later = max(live[at[k] + 1 : at[k + 1]], default=0)
                for most, so_far in ((here, k), (later, k + 1)):
                    if most > budget:
                        over = (budget - most) / self.byte
                        self._row([(back[k], 1), (sent[so_far], -1), *_minus(sums[3][k])], over)
                if max(here, later) > budget:
                    over = (budget - max(here, later)) / self.byte
                    self._row([(back[k], 1), *_minus(sums[1][k]), *_minus(sums[3][k])], over)
        self._out, self._again, self._whole = out, again, whole

    def _column(self, low: float, high: float | None) -> int:
        self._low.append(low)
        self._high.append(high)
        self._cost.append(0.0)
        return len(self._cost) - 1

    def _row(self, entries: Sequence[tuple[int, float]], upper: float, equal: bool = False) -> None:
        rows, columns, values = self._entries
        for column, value in entries:
            rows.append(len(self._upper))
            columns.append(column)
            values.append(value)
        self._upper.append(upper)
        self._equal.append(equal)

    def _recurrence(self, changes: list[list[tuple[int, float]]]) -> list[list[tuple[int, float]]]:
        """For each breakpoint a column that is the sum of all changes up to it, or nothing where that is zero."""
        sums: list[list[tuple[int, float]]] = []
        before: list[tuple[int, float]] = []
        for change in changes:
            if change:
                column = self._column(0, None)
                self._row([(column, -1), *before, *change], 0, equal=True)
                before = [(column, 1)]
            sums.append(before)
        return sums

    @property
    def rows(self) -> int:
        """How many."""
        return len(self._upper)

    @property
    def columns(self) -> int:
        """How many."""
        return len(self._cost)

    def solve(self, seconds: float) -> tuple[int, float, dict[int, float], dict[int, float], dict[int, float]]:
        """HiGHS's status (0: optimal, 2: infeasible), the time in ns, and the shares by storage and by group."""
        import numpy as np
        from scipy.optimize import linprog
        from scipy.sparse import csr_matrix

        rows, columns, values = self._entries
        matrix = csr_matrix((values, (rows, columns)), shape=(self.rows, self.columns))
        upper, equal = np.array(self._upper), np.array(self._equal)
        solved: Any = linprog(
            self._cost,
            A_ub=matrix[~equal],
            b_ub=upper[~equal],
            A_eq=matrix[equal] if equal.any() else None,
            b_eq=upper[equal] if equal.any() else None,
            bounds=list(zip(self._low, self._high, strict=True)),
            method="highs",
            options={"time_limit": seconds},
        )
        if solved.status != 0:
            return int(solved.status), 0.0, {}, {}, {}
        shares = [
            {piece.storage: float(solved.x[column]) for piece, column in zip(self.items, which, strict=True)}
            for which in (self._out, self._again)
        ]
        groups = {g.number: float(solved.x[column]) for g, column in zip(self.groups, self._whole, strict=True)}
        return 0, float(solved.fun) * self.ns, shares[0], shares[1], groups


def _minus(entries: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(column, -value) for column, value in entries]


def _breakpoints(n: int, live: Sequence[int], budget: int, items: Sequence[Piece], most: int) -> list[int]:
    """Positions where something changes, and both ends; neighbours merged beyond `most`."""
    changing = {p for piece in items for p in (piece.pack, piece.gone, piece.need)}
    # where most lives between two of them a row must know how far the link had come
    inner = sorted(p for p in {0, n, *changing} if p <= n)
    for begin, end in pairwise(inner):
        top = max(range(begin, end), key=live.__getitem__)
        if live[top] > budget:
            changing.add(top)
    found = sorted(p for p in {0, n, *changing} if 0 <= p <= n)
    if len(found) <= most:
        return found
    weight = len(found) / most
    return sorted({found[min(round(i * weight), len(found) - 1)] for i in range(most)} | {0, n})
