"""Happens-before on streams and events, with vector clocks.

Every stream counts what was issued to it. A stream knows, for every other stream, up to which count that
stream's work is sure to be done before its own next work: an event is a copy of that knowledge, and waiting
for an event takes it over. An access is ordered before a stream's next work if the stream knows of it.
CPU kernels are never late, so wrong results alone would never show a missing wait; this does.
"""

from __future__ import annotations

import hashlib

from vdnn.errors import RaceError

__all__ = ["Access", "Event", "Execution", "History", "Stream"]

_WAY_OUT = "; if no stream of your own is at work, this is an error in vdnn: please report it"


class Execution:
    """In what order the streams' work really ran, as one number: equal if and only if it ran in the same order."""

    __slots__ = ("_hash",)

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def ran(self, stream: Stream, what: str, nbytes: int) -> None:
        """Note the work that runs next."""
        self._hash.update(f"{stream.name}: {what} {nbytes}\n".encode())

    def digest(self) -> bytes:
        """The order so far."""
        return self._hash.digest()


class Stream:
    """A queue of work in order."""

    __slots__ = ("known", "name", "tick")

    def __init__(self, name: str) -> None:
        self.name = name
        self.tick = 0
        self.known: dict[Stream, int] = {}

    def issue(self) -> Access:
        """Count one more piece of work on this stream."""
        self.tick += 1
        return Access(self, self.tick)

    def record(self) -> Event:
        """An event behind everything issued so far."""
        return Event(self, self.tick, {**self.known, self: self.tick})

    def wait(self, event: Event) -> None:
        """Take over what the event knows."""
        for stream, tick in event.known.items():
            if stream is not self and self.known.get(stream, 0) < tick:
                self.known[stream] = tick

    def __repr__(self) -> str:
        return self.name


class Event:
    """What a stream knew when the event was recorded."""

    __slots__ = ("known", "stream", "tick")

    def __init__(self, stream: Stream, tick: int, known: dict[Stream, int]) -> None:
        self.stream = stream
        self.tick = tick
        self.known = known


class Access:
    """One read or write of a piece of memory: the `tick`-th work of `stream`."""

    __slots__ = ("stream", "tick")

    def __init__(self, stream: Stream, tick: int) -> None:
        self.stream = stream
        self.tick = tick

    def before(self, stream: Stream) -> bool:
        """Whether this access is sure to be over before the stream's next work."""
        return stream is self.stream or stream.known.get(self.stream, 0) >= self.tick


class History:
    """The accesses of one piece of memory that a later one may have to wait for.

    `home` is the stream that the memory was allocated on: whoever gets it next uses it there. `keepers` are streams
    that the allocator was told of; it waits for them first. `shares` are those of memory with bytes in common.
    """

    __slots__ = ("home", "keepers", "reads", "shares", "what", "write")

    def __init__(self, what: str, write: Access | None = None) -> None:
        self.what = what
        self.write = write
        self.home = write.stream if write is not None else None
        self.reads: list[Access] = []
        self.keepers: list[Stream] = []
        self.shares: list[History] = []

    def check_read(self, stream: Stream, doing: str) -> None:
        """A read must come after the last write.

        Raises:
            RaceError: it is not ordered; names both streams.
        """
        if self.write is not None and not self.write.before(stream):
            raise RaceError(
                f"{doing}: {stream} reads {self.what} without waiting for {self.write.stream}, which writes it"
                f"{_WAY_OUT}"
            )

    def check_write(self, stream: Stream, doing: str) -> None:
        """A write must come after the last write and all reads since.

        Raises:
            RaceError: it is not ordered; names both streams.
        """
        for history in (self, *self.shares):
            for access, verb in [(history.write, "writes"), *((read, "reads") for read in history.reads)]:
                if access is not None and not access.before(stream):
                    raise RaceError(
                        f"{doing}: {stream} reuses {self.what} without waiting for {access.stream}, "
                        f"which still {verb} it{_WAY_OUT}"
                    )

    def check_end(self) -> None:
        """The end of the memory must come after every access, as far as its home or a keeper knows.

        Raises:
            RaceError: it is not ordered; names both streams.
        """
        for access, verb in [(self.write, "writes"), *((read, "reads") for read in self.reads)]:
            if access is not None and not any(access.before(s) for s in (self.home, *self.keepers) if s is not None):
                raise RaceError(
                    f"release: {self.home} may reuse {self.what} without waiting for {access.stream}, "
                    f"which still {verb} it{_WAY_OUT}"
                )

    def wrote(self, access: Access) -> None:
        """Note a write; it is ordered after everything before it."""
        self.write = access
        self.reads.clear()
