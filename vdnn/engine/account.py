"""What the engine did to a model so far: `Counts` while it goes on, `EngineReport` in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass, field

from vdnn.units import format_bytes

__all__ = ["Counts", "EngineReport"]


@dataclass(slots=True)
class Counts:
    """What the engine did so far. Bytes are of storages, each counted once a pass.

    `packs` counts what it was shown; a pass in which nothing can move shows it nothing. `no_room` counts prefetches
    that found no device memory and were left for the moment of need.
    """

    passes: int = 0
    packs: int = 0
    saved_storages: int = 0
    offloaded_storages: int = 0
    offloaded_bytes: int = 0
    prefetched_storages: int = 0
    fetched_storages: int = 0
    returned_bytes: int = 0
    encoded_storages: int = 0
    encoded_bytes: int = 0
    code_bytes: int = 0
    dropped_storages: int = 0
    dropped_bytes: int = 0
    recomputed_storages: int = 0
    host_full: int = 0
    no_room: int = 0
    mismatches: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class EngineReport:
    """Totals over all passes so far; `host_…` are of the device's pool. A pass is one forward and its backward."""

    device: str
    policy: str
    passes: int = 0
    packs: int = 0
    offloaded_storages: int = 0
    offloaded_bytes: int = 0
    prefetched_storages: int = 0
    fetched_storages: int = 0
    returned_bytes: int = 0
    encoded_storages: int = 0
    encoded_bytes: int = 0
    code_bytes: int = 0
    dropped_storages: int = 0
    dropped_bytes: int = 0
    host_full: int = 0
    host_used_bytes: int = 0
    host_peak_bytes: int = 0
    host_reserved_bytes: int = 0
    host_pinned_bytes: int = 0
    host_allocations: int = 0
    mismatches: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        passes = max(self.passes, 1)
        lines = [
            f"vdnn on {self.device}, policy {self.policy}, {self.passes} {'pass' if self.passes == 1 else 'passes'}"
        ]
        if self.packs:
            lines.append(f"  saved tensors      {self.packs // passes} a pass")
        elif self.passes:
            lines.append("  saved tensors      all stay, and none was looked at")
        elif not self.notes:
            lines.append("  no training step so far; what moves is decided at the first one")
        if self.offloaded_storages:
            lines += [
                f"  offloaded          {_storages(self.offloaded_storages // passes)}, "
                f"{format_bytes(self.offloaded_bytes // passes)} a pass",
                f"  came back          {format_bytes(self.returned_bytes // passes)} a pass: "
                f"{_storages(self.prefetched_storages // passes)} prefetched, "
                f"{self.fetched_storages // passes} on demand",
            ]
        elif self.packs:
            lines.append("  offloaded          nothing")
        if self.host_allocations:
            lines.append(
                f"  host memory        of all models on this device: {format_bytes(self.host_peak_bytes)} at most, "
                f"{format_bytes(self.host_reserved_bytes)} reserved in {self.host_allocations} "
                f"allocation{'' if self.host_allocations == 1 else 's'} so far, "
                f"{format_bytes(self.host_pinned_bytes)} of it pinned, {format_bytes(self.host_used_bytes)} in use now"
            )
        if self.encoded_storages:
            lines.append(
                f"  encoded            {_storages(self.encoded_storages // passes)} a pass, "
                f"{format_bytes(self.encoded_bytes // passes)} as {format_bytes(self.code_bytes // passes)}"
            )
        if self.dropped_storages:
            lines.append(
                f"  computed again     {_storages(self.dropped_storages // passes)}, "
                f"{format_bytes(self.dropped_bytes // passes)} a pass"
            )
        if self.host_full:
            lines.append(f"  stayed on device   {_storages(self.host_full)}, because the host budget was spent")
        if self.mismatches:
            lines.append(f"  not as planned     {len(self.mismatches)} saved tensors; the first: {self.mismatches[0]}")
        lines.extend(f"  note               {note}" for note in self.notes)
        return "\n".join(lines)


def _storages(number: int) -> str:
    return f"{number} storage{'' if number == 1 else 's'}"
