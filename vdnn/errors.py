"""Every error that vdnn raises on purpose, in one tree.

    VdnnError
    ├── UsageError (ValueError)        a bad argument: unknown name, bad size, wrong device      exit code 2
    │   └── FormatError                a file that is truncated, foreign, or of a newer version
    ├── CaptureError                   a model that cannot be captured; names the op and module  exit code 1
    ├── InfeasibleError                no plan fits the budget; names the least that does        exit code 3
    ├── DeviceOutOfMemory              the virtual device is full
    └── EngineError (RuntimeError)     the engine was asked for something impossible
        ├── PlanMismatchError          a plan made for another model or device
        ├── LifecycleError             a storage was moved from a state that does not allow it
        └── RaceError                  a copy is not ordered after what it depends on

A message says what is wrong, with which values, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CaptureError",
    "DeviceOutOfMemory",
    "EngineError",
    "FormatError",
    "InfeasibleError",
    "LifecycleError",
    "PlanMismatchError",
    "RaceError",
    "UsageError",
    "VdnnError",
    "unknown_name",
]


class VdnnError(Exception):
    """Base of every error that vdnn raises on purpose."""

    exit_code = 1


class UsageError(VdnnError, ValueError):
    """An argument that cannot be used, with the values it may have."""

    exit_code = 2


class FormatError(UsageError):
    """A file that is not one of vdnn's, is damaged, or comes from a newer vdnn."""


class CaptureError(VdnnError):
    """A model whose training step could not be captured."""


class InfeasibleError(VdnnError):
    """No plan fits the budget; the message names the least budget that does."""

    exit_code = 3


class DeviceOutOfMemory(VdnnError, MemoryError):
    """The virtual device has less memory left than was asked for."""


class EngineError(VdnnError, RuntimeError):
    """The engine was asked for something it cannot do."""


class PlanMismatchError(EngineError):
    """A plan that was made for another model, or for another kind of device."""

    exit_code = 2


class LifecycleError(EngineError):
    """A saved storage was moved from a state that does not allow the move."""


class RaceError(EngineError):
    """A copy or a use that is not ordered after what it depends on."""


def unknown_name(what: str, name: str, known: Iterable[str], hint: str = "") -> UsageError:
    """A `UsageError` for a name that is not known, with the nearest names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    if near:
        way_out = f"did you mean {_either(near)}?"
        if len(names) <= _FEW and len(near) < len(names):
            way_out += f" (known are {', '.join(names)})"
    elif len(names) <= 20:
        way_out = f"known are {', '.join(names)}"
    else:
        way_out = f"{len(names)} are known, such as {', '.join(names[:5])}"
    return UsageError(f"unknown {what} {name!r}: {way_out}" + (f" ({hint})" if hint else ""))


# So many names are all told, however near one of them is: the nearest to "tpu" is "virtual".
_FEW = 6


def _either(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
