"""`RunResult`: the numbers of one run, simulated or measured, in one form, so that they compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vdnn.errors import FormatError
from vdnn.values.codec import record, value
from vdnn.values.timeline import Timeline

__all__ = ["PeakItem", "Provenance", "RunResult"]


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a result came about; "" or None where it does not apply."""

    command: str = ""
    commit: str = ""
    vdnn: str = ""
    torch: str = ""
    cuda: str = ""
    device: str = ""
    seed: int | None = None


@record
@dataclass(frozen=True, slots=True)
class PeakItem:
    """A part of the memory that is held at the peak; `module` is "" for sums over the whole step."""

    category: str
    module: str
    nbytes: int


@value("result", 1)
@dataclass(frozen=True, slots=True)
class RunResult:
    """One run of one step. None means: not known to this run (never: zero).

    Requested is the sum of live storages, allocated counts the allocator's blocks, reserved its segments.
    A prediction of the iteration's time has an interval that 90 % of measured times are expected in.
    `stall_ns` is the time that the compute stream waited for copies. `exact` says whether every output, loss and
    gradient was equal, bit for bit, to those of the same steps without offload.
    """

    source: Literal["simulated", "measured"]
    model: str
    batch: int
    gpu: str
    policy: str
    precision: str
    trace: str
    plan: str
    peak_requested_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    iteration_time_ns: int | None = None
    iteration_time_low_ns: int | None = None
    iteration_time_high_ns: int | None = None
    forward_time_ns: int | None = None
    backward_time_ns: int | None = None
    stall_ns: int | None = None
    offloaded_bytes: int | None = None
    prefetched_bytes: int | None = None
    host_peak_bytes: int | None = None
    fits: bool | None = None
    exact: bool | None = None
    peak_at: str = ""
    peak_items: tuple[PeakItem, ...] = ()
    notes: tuple[str, ...] = ()
    timeline: Timeline | None = None
    provenance: Provenance = Provenance()

    def check(self) -> None:
        """Name the first thing that is wrong.

        Raises:
            FormatError: a negative size or time.
        """
        for name in self.__slots__:
            number = getattr(self, name)
            if isinstance(number, int) and number < 0:
                raise FormatError(f"result of {self.model!r}: {name} is {number}, it must not be negative")
        if self.timeline is not None:
            self.timeline.check()
