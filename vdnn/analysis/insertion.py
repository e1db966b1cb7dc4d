"""Positions in a step into which ops were put, and values of it with other positions.

Planners rewrite steps a hundred times, storage by storage: `dataclasses.replace` takes five times as long as the
constructors that these functions call.
"""

from __future__ import annotations

from collections.abc import Sequence

from vdnn.values.trace import ModuleCall, Op, Phase, SavedTensor, Storage

__all__ = ["call_at", "op_of", "saved_at", "shifted", "stored_at"]


def shifted(n: int, at: Sequence[int], before: Sequence[int]) -> list[int]:
    """Where each position from 0 to n is now.

    `at` are the positions where ops were put in, ascending, and `before[k]` is how many were put in at the first k of
    them. What is put in at a position comes after it.
    """
    found: list[int] = []
    for k, end in enumerate((*at, n)):
        found.extend(range(len(found) + before[k], end + 1 + before[k]))
    return found


def stored_at(s: Storage, alloc: int, release: int, need: int, free: int) -> Storage:
    """The storage with another lifetime."""
    return Storage(s.nbytes, s.category, s.name, alloc, release, need, free, s.held)


def saved_at(t: SavedTensor, storage: int, packed_at: int, unpacked_at: tuple[int, ...]) -> SavedTensor:
    """The saved tensor in another storage, packed and unpacked elsewhere."""
    return SavedTensor(
        t.module, t.index, storage, t.dtype, t.shape, t.stride, t.offset, t.nbytes, packed_at, unpacked_at, t.node
    )


def call_at(
    call: ModuleCall, forward_begin: int, forward_end: int, backward_begin: int, backward_end: int
) -> ModuleCall:
    """The module call elsewhere."""
    return ModuleCall(
        call.fqn, call.call, call.type, call.kind, call.parent, forward_begin, forward_end, backward_begin, backward_end
    )


def op_of(op: Op, phase: Phase, reads: tuple[int, ...], writes: tuple[int, ...]) -> Op:
    """The op on other storages."""
    return Op(
        op.name,
        phase,
        op.module,
        op.kernel,
        op.dtype,
        op.dims,
        reads,
        writes,
        op.flops,
        op.read_bytes,
        op.written_bytes,
        op.workspace_bytes,
    )
