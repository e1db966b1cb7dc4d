"""Does a step fit? The published batch of each training row did, the next larger one that was tried did not.

The benchmark took the largest batch of a ladder that did not run out of memory. So every row below the top of the
ladder says two things about the card, and a prediction is right if it says both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vdnn.analysis.liveness import requested
from vdnn.fidelity.captures import Captures
from vdnn.fidelity.rows import StepRow
from vdnn.sim.allocator_step import fits, step_memory
from vdnn.sim.workspaces import allocatable_bytes, with_libraries
from vdnn.values import Hardware, Trace, hardware

__all__ = ["LADDER", "Verdict", "judged", "memory_lines", "next_batch", "read_verdicts"]

LADDER = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
# Of the memory: closer to it than that, what is not modelled of the libraries' workspaces decides.
_CLOSE = 32


@dataclass(frozen=True, slots=True)
class Verdict:
    """The least memory with which the allocator's model runs a row's batch, and the next larger one; what there is.

    `requested_bytes` are the peaks of live bytes, the naive measure.
    """

    model: str
    family: str
    gpu: str
    batch: int
    next_batch: int
    least_bytes: int
    next_least_bytes: int
    requested_bytes: int
    next_requested_bytes: int
    available_bytes: int
    memory_bytes: int

    @property
    def way(self) -> str:
        """ "right", "tight" (what fitted is said not to fit) or "loose" (what did not fit is said to fit)."""
        if self.least_bytes > self.available_bytes:
            return "tight"
        return "loose" if self.next_least_bytes <= self.available_bytes else "right"

    @property
    def naively_right(self) -> bool:
        """Whether comparing live bytes with the card's whole memory gives both answers."""
        return self.requested_bytes <= self.memory_bytes < self.next_requested_bytes


def next_batch(batch: int) -> int | None:
    """The batch that was tried before this one; None at the top of the ladder, or for a batch that is not on it."""
    place = LADDER.index(batch) if batch in LADDER else 0
    return LADDER[place - 1] if place else None


def judged(rows: Sequence[StepRow], captures: Captures, tell: Callable[[str, int, int], None]) -> dict[str, Any]:
    """The verdict on every training row that has a next larger batch, as plain data; both are captured if need be."""
    found: list[dict[str, Any]] = []
    chosen = [(row, larger) for row in rows if row.kind == "train" and (larger := next_batch(row.batch))]
    for number, (row, larger) in enumerate(chosen):
        tell(f"memory {row.model} {row.batch} and {larger}", number, len(chosen))
        machine = hardware(row.gpu)
        here, there = (captures.make(one) for one in (row, replace(row, batch=larger)))
        if here is not None and there is not None:
            found.append(asdict(_verdict(row, larger, machine, here, there)))
    return {"verdicts": found, "without_capture": len(chosen) - len(found)}


def _verdict(row: StepRow, larger: int, machine: Hardware, here: Trace, there: Trace) -> Verdict:
    return Verdict(
        row.model,
        row.family,
        row.gpu,
        row.batch,
        larger,
        _least(here, machine),
        _least(there, machine),
        max(requested(here), default=0),
        max(requested(there), default=0),
        allocatable_bytes(here, machine),
        machine.memory_bytes,
    )


def _least(trace: Trace, machine: Hardware) -> int:
    """The least memory with which the step runs, to a 256th."""
    step = with_libraries(trace, machine)
    low, high = max(requested(trace), default=0) - 1, step_memory(step, (), 1 << 60).peak_reserved_bytes
    while high - low > max(high >> 8, 1):
        middle = (low + high) // 2
        if fits(step, (), middle):
            high = middle
        else:
            low = middle
    return high


def read_verdicts(folder: Path) -> list[Verdict]:
    """Those of a study, from its file."""
    path = folder / "memory.json"
    return [Verdict(**row) for row in json.loads(path.read_text())["verdicts"]] if path.exists() else []


def memory_lines(folder: Path) -> list[str]:
    """How many verdicts are right, by GPU, and those that are not, with the reason, as Markdown; none without rows."""
    verdicts = read_verdicts(folder)
    if not verdicts:
        return []
    lines = [
        "| rows | number | fits, and not at the next batch | said to fit, did not | said not to fit, did | naive |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for gpu in sorted({v.gpu for v in verdicts}):
        chosen = [v for v in verdicts if v.gpu == gpu]
        ways = [v.way for v in chosen]
        naive = sum(v.naively_right for v in chosen)
        lines.append(
            f"| training, {gpu} | {len(chosen)} | {ways.count('right') / len(chosen):.1%} | {ways.count('loose')} | "
            f"{ways.count('tight')} | {naive / len(chosen):.1%} |"
        )
    wrong = [v for v in verdicts if v.way != "right"]
    if wrong:
        lines += ["", "| model | batch | next | needs [GiB] | next needs [GiB] | there is [GiB] | why |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    for v in sorted(wrong, key=lambda v: (v.way, v.model)):
        sizes = (v.least_bytes, v.next_least_bytes, v.available_bytes)
        cells = " | ".join(f"{size / 2**30:.1f}" for size in sizes)
        lines.append(f"| {v.model} | {v.batch} | {v.next_batch} | {cells} | {_why(v)} |")
    return lines


def _why(verdict: Verdict) -> str:
    nbytes = verdict.least_bytes if verdict.way == "tight" else verdict.next_least_bytes
    off = abs(nbytes - verdict.available_bytes)
    if off * _CLOSE <= verdict.available_bytes:
        return "close to the limit: context and kernels are known to 0.5 GiB, and cuDNN's algorithms are not modelled"
    missing = "sees too much" if verdict.way == "tight" else "does not see"
    return f"not known: {off / 2**30:.1f} GiB that the capture {missing}, or the measured run failed otherwise"
