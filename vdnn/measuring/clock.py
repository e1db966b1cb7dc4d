"""How long a call takes, on a machine that may be doing other things, too.

With one thread the clock is the process's own CPU time: what others run beside it does not count, and on a quiet
machine it equals the time on the wall. With more threads it is the wall's. A call that touches new memory takes page
faults; they are counted and taken off, at the price of one, because a step's are counted from its own allocations.

In a training step an op finds what was just made in the cache, and weights and saved tensors no longer: so each is
timed again and again, and right after other memory was written, and the mean of both is its time.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["Clock", "now_ns"]

OTHER = 48 * 2**20  # bytes: more than most caches hold
LEAST = 10  # of the time that a call takes, this part is not for page faults, whatever their price


def now_ns() -> int:
    """CPU time of the process with one thread of torch's, else the time on the wall."""
    return time.process_time_ns() if torch.get_num_threads() == 1 else time.perf_counter_ns()


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Clock:
    """Times calls, each for `budget_ns`; `page_ns` is what a page fault takes.

    After `hurry_at_ns` on the wall, if one is given, a call is timed once: others keep the machine busy.
    """

    def __init__(self, budget_ns: int, page_ns: int = 0, hurry_at_ns: int | None = None) -> None:
        self.budget_ns = budget_ns
        self.page_ns = page_ns
        self.hurry_at_ns = hurry_at_ns
        self.hurried = 0  # calls that were timed once
        self._other = torch.zeros(OTHER // 4)

    def ns(self, call: Callable[[], object]) -> int:
        """The time of one call: mean of the median with a warm cache and with a cold one."""
        call()
        if self.hurry_at_ns is not None and time.perf_counter_ns() > self.hurry_at_ns:
            self.hurried += 1
            return self._spent(call, 1)
        once = -now_ns()
        call()
        once += now_ns()  # page faults and all: their price may be above what they took here
        repeats = max(1, 200_000 // max(once, 1))  # a round of 0.2 ms, or one call
        warm: list[float] = []
        began = now_ns()
        while len(warm) < 3 or now_ns() - began < self.budget_ns:
            warm.append(self._spent(call, repeats) / repeats)
        if repeats > 20:  # what takes less than 10 µs works on next to nothing
            return max(1, round(statistics.median(warm)))
        cold = []
        for _ in range(3):
            self._other.add_(1)
            cold.append(self._spent(call, 1))
        return max(1, round((statistics.median(warm) + statistics.median(cold)) / 2))

    def _spent(self, call: Callable[[], object], times: int) -> int:
        """Time of some calls without their page faults."""
        faults, start = _faults(), now_ns()
        for _ in range(times):
            call()
        raw = now_ns() - start
        spent = raw - (_faults() - faults) * self.page_ns
        return max(spent, raw // LEAST, times)
