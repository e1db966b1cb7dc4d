"""Memory over time: the running sums of a timeline's memory events, by category.

Every event is a point of its own, also where several share one time: a peak that lasts no time is a peak.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vdnn.reporting.rows import CATEGORIES
from vdnn.values import Timeline

__all__ = ["Levels", "memory_levels", "thinned"]

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Levels:
    """`nbytes[c, i]` bytes of category `categories[c]` are held from `times_ns[i]` on, until the next point."""

    times_ns: Integers
    categories: tuple[str, ...]
    nbytes: Integers

    @property
    def total(self) -> Integers:
        """Bytes held in all, at each point."""
        found: Integers = self.nbytes.sum(axis=0)
        return found

    @property
    def peak_index(self) -> int:
        """The point at which most is held, the first of several."""
        return int(np.argmax(self.total))


def memory_levels(timeline: Timeline, where: str = "device") -> Levels:
    """The memory of a timeline after each event; the first point is what was resident before the step."""
    events = [event for event in timeline.memory if event.where == where]
    resident = timeline.resident if where == "device" else ()
    present = {name for name, _ in resident} | {event.category for event in events}
    categories = tuple(c for c in CATEGORIES if c in present) + tuple(sorted(present - set(CATEGORIES)))
    index = {name: i for i, name in enumerate(categories)}
    changes = np.zeros((len(categories), len(events) + 1), dtype=np.int64)
    times = np.zeros(len(events) + 1, dtype=np.int64)
    for name, nbytes in resident:
        changes[index[name], 0] += nbytes
    for i, event in enumerate(events, start=1):
        changes[index[event.category], i] = event.nbytes
        times[i] = event.time_ns
    return Levels(times, categories, np.cumsum(changes, axis=1))


def thinned(found: Levels, points: int = 6000) -> Levels:
    """At most about `points` points that look the same: of each stretch of time the first, the least and the most."""
    if len(found.times_ns) <= points:
        return found
    first, last = int(found.times_ns[0]), int(found.times_ns[-1])
    stretch = (found.times_ns - first) * (points // 3) // max(1, last - first)
    starts = np.flatnonzero(np.diff(stretch, prepend=-1))
    total = found.total
    keep = [0, len(total) - 1, found.peak_index]
    for begin, end in zip(starts, [*starts[1:], len(total)], strict=True):
        part = total[begin:end]
        keep += [int(begin), int(begin + part.argmin()), int(begin + part.argmax())]
    chosen = np.unique(np.array(keep))
    return Levels(found.times_ns[chosen], found.categories, found.nbytes[:, chosen])
