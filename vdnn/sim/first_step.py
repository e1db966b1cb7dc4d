"""A training's first step, and those after it, from the allocations of one step.

The trace is of a step in the middle of a training. The first one differs: gradients that are zeroed in place do not
exist yet, and are what backward makes first; the optimizer makes its states when it first runs, after backward; and
cuDNN, told to benchmark, tries its algorithms at every new shape, after which torch empties the cache
(aten/src/ATen/native/cudnn/Conv_v7.cpp, Conv_v8.cpp). So in every later step gradients and states lie where the first
step left room, and that room is missing to its feature maps: what is reserved depends on it.
"""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

from vdnn.values.trace import Trace

if TYPE_CHECKING:
    from vdnn.sim.allocator_step import Script

__all__ = ["first_step", "later_step"]


def first_step(trace: Trace, script: Script) -> tuple[list[int], list[int]]:
    """Calls and their positions in the first step. `len(script.sizes)` as a call empties the cache."""
    flush = len(script.sizes)
    states, stolen, absent = _made_late(trace)
    tried = _tried(trace) if trace.recipe.cudnn_benchmark else set()
    calls: list[int] = []
    positions: list[int] = []
    here = -1

    def reach(position: int) -> None:
        nonlocal here
        while here < position:
            extra = ([flush] if here in tried else []) + states.get(here + 1, [])
            here += 1
            calls.extend(extra)
            positions.extend([here] * len(extra))

    for call, position in zip(script.calls, script.positions, strict=True):
        reach(position)
        piece = call if call >= 0 else ~call
        if (piece in absent and position < 0) or (piece in stolen and call < 0):
            continue
        calls.append(stolen.get(call, call))
        positions.append(position)
    reach(len(trace.ops))
    stays = {i for i, s in enumerate(trace.storages) if s.alloc < 0} | {flush}
    return _with_ends(calls, positions, stays, len(trace.ops))


def later_step(trace: Trace, script: Script) -> tuple[list[int], list[int]]:
    """Calls and their positions in every step after the first: all but what is still there from before the step."""
    begin = next((i for i, position in enumerate(script.positions) if position >= 0), len(script.calls))
    gone = {~call for call in script.calls if call < 0}
    anew = [piece for piece in script.calls[:begin] if piece in gone]
    return _with_ends(anew + script.calls[begin:], [-1] * len(anew) + script.positions[begin:], set(), len(trace.ops))


def _with_ends(calls: list[int], positions: list[int], stays: Set[int], end: int) -> tuple[list[int], list[int]]:
    """What a step leaves behind goes before the next, but for what `stays`: outputs, gradients that become None."""
    left = dict.fromkeys(call for call in calls if call >= 0 and call not in stays)
    for call in calls:
        if call < 0:
            left.pop(~call, None)
    return calls + [~piece for piece in left], positions + [end] * len(left)


def _made_late(trace: Trace) -> tuple[dict[int, list[int]], dict[int, int], set[int]]:
    """Optimizer states by the op that first touches them; temporaries that become gradients; all that is not there."""
    states: dict[int, list[int]] = {}
    stolen: dict[int, int] = {}
    absent: set[int] = set()
    storages = trace.storages
    backward, optimizer = trace.forward_end, trace.backward_end
    for op in trace.ops[backward:optimizer]:
        if op.name != "aten.add_.Tensor" or len(op.reads) != 2:
            continue
        there, new = op.reads
        kept, made = storages[there], storages[new]
        alike = kept.category == "gradient" and kept.alloc < 0 <= made.alloc and made.nbytes == kept.nbytes
        if alike and there not in absent and new not in stolen:
            absent.add(there)
            stolen[new] = there
    for i in range(optimizer, len(trace.ops)):
        for number in (*trace.ops[i].reads, *trace.ops[i].writes):
            s = storages[number]
            if s.category == "optimizer_state" and s.alloc < 0 and s.nbytes and number not in absent:
                absent.add(number)
                states.setdefault(i, []).append(number)
    return states, stolen, absent


def _tried(trace: Trace) -> set[int]:
    """Convolutions of a shape that was not there before."""
    seen: set[object] = set()
    found = set()
    for i, op in enumerate(trace.ops):
        key = (op.name, op.dtype, op.dims)
        if op.kernel == "conv" and key not in seen:
            seen.add(key)
            found.add(i)
    return found
