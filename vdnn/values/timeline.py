"""`Timeline`: what happened when. Times are nanoseconds from the start of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vdnn.errors import FormatError
from vdnn.values.codec import record, value

__all__ = ["STREAMS", "MemoryEvent", "Span", "Stall", "Timeline"]

Stream = Literal["host", "compute", "offload", "prefetch", "communication"]
STREAMS: tuple[Stream, ...] = ("host", "compute", "offload", "prefetch", "communication")


@record
@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of work on a stream; `what` is an op's or a saved tensor's name, `phase` the step's part."""

    stream: Stream
    what: str
    phase: str
    start_ns: int
    end_ns: int
    nbytes: int


@record
@dataclass(frozen=True, slots=True)
class Stall:
    """A stretch in which `stream` waited; `cause` says for what, `what` for which copy."""

    stream: Stream
    cause: Literal["release", "prefetch", "fetch", "layer", "launch", "all-reduce"]
    what: str
    start_ns: int
    end_ns: int


@record
@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """Memory taken (`nbytes` > 0) or given back (< 0) at a position of the step."""

    time_ns: int
    position: int
    nbytes: int
    category: str
    where: Literal["device", "host"]


@value("timeline", 1)
@dataclass(frozen=True, slots=True)
class Timeline:
    """Spans per stream, stalls with their cause, and memory events, each in order of time.

    `resident` is what was on the device before the first event: (category, bytes) pairs.
    """

    spans: tuple[Span, ...] = ()
    stalls: tuple[Stall, ...] = ()
    memory: tuple[MemoryEvent, ...] = ()
    resident: tuple[tuple[str, int], ...] = ()

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams of a step: all but that of communication, where a GPU works alone."""
        alone = all(span.stream != "communication" for span in self.spans)
        return STREAMS[:-1] if alone else STREAMS

    def check(self) -> None:
        """Name the first thing that is wrong.

        Raises:
            FormatError: a span ends before it starts, or two spans of one stream overlap.
        """
        ends: dict[str, int] = {}
        for span in self.spans:
            if span.end_ns < span.start_ns:
                raise FormatError(f"{span.stream} span {span.what!r} ends before it starts")
            if span.start_ns < ends.get(span.stream, 0):
                raise FormatError(f"{span.stream} span {span.what!r} starts before the one before it ends")
            ends[span.stream] = span.end_ns
        for stall in self.stalls:
            if stall.end_ns < stall.start_ns:
                raise FormatError(f"stall of {stall.stream} for {stall.what!r} ends before it starts")
