"""One unit for a whole column or axis: numbers that stand together share it, and the header names it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["NOTHING", "Scale", "byte_scale", "time_scale"]

NOTHING = "--"


@dataclass(frozen=True, slots=True)
class Scale:
    """A unit: `divisor` base units (bytes or nanoseconds) make one; text shows `digits` decimals."""

    unit: str
    divisor: int
    digits: int

    def of(self, number: int) -> float:
        """A number of base units in this unit."""
        return number / self.divisor

    def text(self, number: int | None, sign: bool = False) -> str:
        """The number in this unit, without the unit; "--" for None, "<0.01" for what would round to zero."""
        if number is None:
            return NOTHING
        least = 10**-self.digits
        if number != 0 and abs(number) / self.divisor < least / 2:
            return f"{'>-' if number < 0 else '<'}{least:.{self.digits}f}"
        return f"{number / self.divisor:{'+' if sign and number else ''}.{self.digits}f}"


_BYTES = (Scale("GiB", 2**30, 2), Scale("MiB", 2**20, 1), Scale("KiB", 2**10, 1))
_TIMES = (Scale("s", 10**9, 3), Scale("ms", 10**6, 2), Scale("µs", 10**3, 1))


def byte_scale(sizes: Iterable[int | None]) -> Scale:
    """GiB, MiB or KiB: the largest of which there is at least one."""
    return _fitting(_BYTES, sizes, 1)


def time_scale(times_ns: Iterable[int | None]) -> Scale:
    """s, ms or µs; seconds only from ten up, so that iteration times read as milliseconds."""
    largest = max((abs(t) for t in times_ns if t is not None), default=0)
    if largest >= 10 * _TIMES[0].divisor:
        return _TIMES[0]
    return _fitting(_TIMES[1:], [largest], 1)


def _fitting(scales: tuple[Scale, ...], numbers: Iterable[int | None], least: int) -> Scale:
    largest = max((abs(n) for n in numbers if n is not None), default=0)
    if largest == 0:
        return scales[0]
    for scale in scales:
        if largest >= least * scale.divisor:
            return scale
    return scales[-1]
