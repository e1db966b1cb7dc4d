"""Which saved storages a code may stand for, and which code: what the nodes that read them in backward leave possible.

    encodable(trace)[storage]    the smallest code that is enough for every node that saves the storage

A storage that a convolution (or any node that is not in `READERS`) saves, too, has none: that node needs the values.
Whether encoding frees anything (somebody may hold the storage, backward may need it at once) is for policies to ask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vdnn.values.codes import CODES, ITEM_BYTES, Code, allows, fits
from vdnn.values.trace import SavedTensor, Trace

__all__ = ["elements_of", "encodable", "refusals", "windows"]

_SMALLEST_FIRST: tuple[Code, ...] = ("shape", "sign", "positive", "bits", "index8", "index16")
assert set(_SMALLEST_FIRST) == set(CODES)


def encodable(trace: Trace) -> dict[int, Code]:
    """The smallest code of every saved storage that has one."""
    tensors: dict[int, list[int]] = {}
    for i, t in enumerate(trace.saved):
        tensors.setdefault(t.storage, []).append(i)
    made = _pools(trace)
    found = {}
    for storage, group in tensors.items():
        code = next((code for code in _SMALLEST_FIRST if not _refusal(trace, storage, group, code, made)), None)
        if code is not None:
            found[storage] = code
    return found


def refusals(trace: Trace, codes: Mapping[int, Code]) -> dict[int, str]:
    """Of codes that cannot stand for their storages, why."""
    tensors: dict[int, list[int]] = {}
    for i, t in enumerate(trace.saved):
        tensors.setdefault(t.storage, []).append(i)
    made = _pools(trace)
    why = {storage: _refusal(trace, storage, tensors[storage], code, made) for storage, code in codes.items()}
    return {storage: text for storage, text in why.items() if text}


def elements_of(trace: Trace, storage: int, dtype: str) -> int:
    """How many elements the storage holds."""
    return trace.storages[storage].nbytes // ITEM_BYTES[dtype]


def windows(trace: Trace, storage: int) -> tuple[int, int] | None:
    """Of a storage of MaxPool2d's indices how far windows reach and are apart (`Op.dims`); None for another."""
    return _pools(trace).get(storage)


def _pools(trace: Trace) -> dict[int, tuple[int, int]]:
    """The storages that `max_pool2d_with_indices` writes, with the last two of its dims."""
    found = {}
    for op in trace.ops[: trace.forward_end]:
        if op.name.startswith("aten.max_pool2d_with_indices") and len(op.dims) == 4:
            for storage in op.writes:
                found[storage] = op.dims[2], op.dims[3]
    return found


def _refusal(trace: Trace, storage: int, group: Sequence[int], code: Code, made: dict[int, tuple[int, int]]) -> str:
    s = trace.storages[storage]
    saved = [trace.saved[i] for i in group]
    if s.category != "activation":
        return f"a {s.category.replace('_', ' ')}: not a feature map"
    if len({t.dtype for t in saved}) > 1 or not fits(code, saved[0].dtype):
        return f"the code {code!r} is not for {', '.join(sorted({t.dtype for t in saved}))}"
    if not s.nbytes or s.nbytes % ITEM_BYTES[saved[0].dtype]:
        return f"{s.nbytes} bytes are no whole number of elements"
    for t in saved:
        if not allows(code, t.node):
            return f"{t.node or 'a node that backward does not run'} needs more of it than the code {code!r} keeps"
    return _index_refusal(trace, saved, s.nbytes, code, made.get(storage)) if code.startswith("index") else ""


def _index_refusal(
    trace: Trace, saved: Sequence[SavedTensor], nbytes: int, code: Code, pool: tuple[int, int] | None
) -> str:
    """An index is told by its place in its window, so the window must be known: the module's own attributes say it."""
    t = saved[0]
    if pool is None or t.module < 0 or trace.modules[t.module].type != "MaxPool2d":
        return "not the indices of a MaxPool2d"
    if len(saved) > 1 or t.index == 0 or 8 * math.prod(t.shape) != nbytes:
        return "not all of the indices, as the pool made them"
    most = {"index8": 255, "index16": 65535}[code]
    return "" if pool[0] <= most else f"a window reaches {pool[0]} elements far, {code!r} {most}"
