"""Which saved storages a policy may move, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass

from vdnn.analysis.moments import MOVABLE
from vdnn.policies.options import Options
from vdnn.units import format_bytes
from vdnn.values.trace import SavedTensor, Storage, Trace

__all__ = ["WRITTEN_LATER", "Saved", "inside", "survey"]

# Nodes of ops that write to a tensor that they have saved, and do not count that as a change of it.
WRITTEN_LATER = ("RreluWithNoiseBackward0",)


@dataclass(frozen=True, slots=True)
class Saved:
    """One storage that autograd saves, with its saved tensors in pack order; `why` it must stay, or ""."""

    storage: int
    nbytes: int
    tensors: tuple[int, ...]
    why: str

    @property
    def movable(self) -> bool:
        """It may be offloaded."""
        return not self.why


def inside(trace: Trace) -> list[int]:
    """The saved tensors whose pack and unpack the engine can observe: those of the model, not of the loss."""
    return [i for i, t in enumerate(trace.saved) if t.module >= 0]


def survey(trace: Trace, options: Options) -> list[Saved]:
    """Every saved storage, in the order of its first pack."""
    tensors: dict[int, list[int]] = {}
    for i, t in enumerate(trace.saved):
        tensors.setdefault(t.storage, []).append(i)
    return [
        Saved(storage, trace.storages[storage].nbytes, tuple(found), _why(trace, storage, found, options))
        for storage, found in tensors.items()
    ]


def _why(trace: Trace, storage: int, tensors: list[int], options: Options) -> str:
    s = trace.storages[storage]
    saved = [trace.saved[i] for i in tensors]
    if s.category not in MOVABLE:
        return f"a {s.category.replace('_', ' ')}: not a feature map"
    if s.name.startswith("cast of"):
        return f"{s.name}: a weight's low-precision copy, which can be cast again"
    if s.held:
        return f"held by {s.held} until backward: offloading it would free nothing"
    if s.nbytes < options.min_bytes:
        return f"smaller than {format_bytes(options.min_bytes)}"
    if any(t.module < 0 for t in saved):
        return "saved outside the model too (by the loss), where wrap does not see it"
    if any(t.node in WRITTEN_LATER for t in saved):
        return "its op saves it first and fills it then, which no pack hook sees"
    if s.need < 0:
        return "backward never asks for it"
    if options.regime != "paper" and _no_gap(s, saved):  # vDNN offloads the last layer's X, too
        return "backward needs it as soon as it could leave"
    return ""


def _no_gap(s: Storage, saved: list[SavedTensor]) -> bool:
    return s.need <= max(s.release, *(t.packed_at for t in saved))
