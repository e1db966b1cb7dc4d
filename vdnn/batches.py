"""The largest batch that fits: found with few captures, because memory grows almost linearly with the batch.

Two small batches give a line; where it meets the memory is the first guess. From there in steps of an eighth until
one fits and one does not, then by bisection. The simulator is the judge of each.
"""

from __future__ import annotations

from collections.abc import Callable

from vdnn.errors import CaptureError, InfeasibleError
from vdnn.units import format_bytes
from vdnn.values import RunResult

__all__ = ["largest_batch"]

# Larger batches are sought in steps of this share: nobody runs a batch of 1237.
_GRAIN = 32
_FIRST = 8


def largest_batch(
    simulated: Callable[[int], RunResult], memory_bytes: int, *, limit: int = 1 << 16
) -> tuple[RunResult, RunResult | None]:
    """The result at the largest batch that fits, and at the next larger one that was tried and does not.

    Args:
        simulated: the result of a step at a batch; `fits` decides. It raises `InfeasibleError` where there is no plan
            with which that batch fits; such a batch has no result.
        memory_bytes: what the peaks are compared with when a batch is guessed.
        limit: no larger batch is tried; the second result is None if this one fits, or the next one has no plan.

    Raises:
        InfeasibleError: a batch of 1 does not fit, or the smallest that the model can run.
        CaptureError: the model cannot be captured.
    """
    known: dict[int, RunResult] = {}
    impossible: dict[int, InfeasibleError] = {}

    def fits(batch: int) -> bool:
        if batch not in known and batch not in impossible:
            try:
                known[batch] = simulated(batch)
            except InfeasibleError as error:
                impossible[batch] = error
            except CaptureError:
                if batch > min((*known, *impossible), default=0):
                    raise
                return False  # a larger one ran: this one is too small for the model (batch norm of one value)
        return batch in known and bool(known[batch].fits)

    low, high = 0, limit + 1  # `low` fits (0 always), `high` does not
    batch = min(_FIRST, limit)
    while high - low > _grain(low):
        if fits(batch):
            low = batch
        else:
            high = batch
        fitted = sum(bool(result.fits) for result in known.values())
        if high <= limit:  # there is one on each side, or there is nothing below yet
            near = high - max(1, high // 8)
            batch = near if low < near and len(known) + len(impossible) == 3 else (low + high) // 2
            batch = max(batch, 1)
        elif fitted == 1:
            batch = min(4 * low, limit)
        else:
            line = _meets(known, memory_bytes) if fitted == 2 else low + max(_grain(low), low // 8)
            batch = min(max(line, low + 1), limit)
    if low == 0:
        least = min((*known, *impossible))
        if least in impossible:
            raise impossible[least]
        one = known[least]
        smallest = "" if one.batch == 1 else ", the smallest that the model runs"
        raise InfeasibleError(
            f"{one.model} does not fit on {one.gpu} under {one.policy} even with a batch of {one.batch}{smallest}: its "
            f"peak is {format_bytes(_peak(one))} of {format_bytes(memory_bytes)}; take another policy, or a larger GPU"
        )
    return known[low], known.get(high)


def _grain(batch: int) -> int:
    return max(1, batch // _GRAIN)


def _peak(result: RunResult) -> int:
    """What grows with the batch: near its limit the allocator gives segments back, so reserved memory does not."""
    return result.peak_allocated_bytes or result.peak_requested_bytes or 0


def _meets(known: dict[int, RunResult], memory_bytes: int) -> int:
    """Where the line through two peaks meets the memory."""
    (one, two) = sorted(known)
    slope = (_peak(known[two]) - _peak(known[one])) / (two - one)
    return int(one + (memory_bytes - _peak(known[one])) / slope) if slope > 0 else 4 * two
