"""The life of one saved storage, as states with checked moves.

    RESIDENT ──▶ OFFLOADING ──▶ ON_HOST ──▶ PREFETCHING ──▶ RESIDENT ──▶ RELEASED

A storage may be asked for while its copy out is still on the way (the original is still there, and nothing
moves), and may be dropped from any state (a graph that never runs backward).
"""

from __future__ import annotations

from enum import Enum

from vdnn.errors import LifecycleError

__all__ = ["State", "move"]


class State(Enum):
    """Where the bytes of a saved storage are."""

    RESIDENT = "on the device"
    OFFLOADING = "on the device, being copied out"
    ON_HOST = "in host memory"
    PREFETCHING = "in host memory, being copied back"
    RELEASED = "dropped"

    __hash__ = object.__hash__  # members are single: the enum's own hash is a slow one, of the name


_MOVES = {
    State.RESIDENT: (State.OFFLOADING, State.RELEASED),
    State.OFFLOADING: (State.ON_HOST, State.RELEASED),
    State.ON_HOST: (State.PREFETCHING, State.RELEASED),
    State.PREFETCHING: (State.RESIDENT, State.RELEASED),
    State.RELEASED: (),
}


def move(current: State, wanted: State) -> State:
    """The wanted state, if the move is allowed.

    Raises:
        LifecycleError: it is not; names both states and the ones allowed.
    """
    if wanted in _MOVES[current]:
        return wanted
    allowed = ", ".join(sorted(state.name for state in _MOVES[current])) or "nothing"
    raise LifecycleError(
        f"a saved storage cannot go from {current.name} to {wanted.name}; from there: {allowed}. This is an "
        "error in vdnn: please report it, with the model and its plan"
    )
