"""What can be asked of a policy, checked before anything expensive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vdnn.errors import UsageError, unknown_name

__all__ = ["RULES", "Options"]

RULES = ("event", "paper")


@dataclass(frozen=True, slots=True)
class Options:
    """How to decide.

    `rules`: "event" bounds what is on its way in bytes; "paper" synchronises at every layer, as vDNN does.
    `min_bytes`: smaller storages stay. Of the event rules only: `max_inflight_bytes` is the most that may be
    on its way out before the compute stream waits for the oldest copy, `window_bytes` how far ahead of its
    use a copy back may start; None takes the largest storage that is offloaded, which is as much as the
    paper's rules hold. `keep_soon` keeps what backward needs before its copy out could be over.
    """

    rules: Literal["event", "paper"] = "event"
    min_bytes: int = 1 << 20
    max_inflight_bytes: int | None = None
    window_bytes: int | None = None
    keep_soon: bool = True

    def check(self) -> None:
        """Name the first option that is wrong.

        Raises:
            UsageError: unknown rules, or a negative size.
        """
        if self.rules not in RULES:
            raise unknown_name("rules", str(self.rules), RULES)
        for name in ("min_bytes", "max_inflight_bytes", "window_bytes"):
            size = getattr(self, name)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
                raise UsageError(f"{name} is {size!r}: give a number of bytes, 0 or more")
