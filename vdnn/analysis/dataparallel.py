"""The step of one rank under DistributedDataParallel: buckets of gradients beside the gradients, copied in and out.

    step, buckets = data_parallel(trace, node)

DDP copies each gradient into a flat bucket as soon as it is there, sums a full bucket over the ranks while backward
goes on, waits for all of them at the end of backward and copies the sums back into the gradients. Buckets are filled
in the order in which gradients get ready (DDP finds it in its first step and sticks to it): the first takes gradients
until it has 1 MiB, the others until they have 25 MiB; what goes over is in. They stay for the whole training, so
gradients take their memory twice: that is `gradient_as_bucket_view=False`, the default.

The buckets' sizes equal those of a real DDP (tests/sim/test_node.py).

Not in it: the broadcast of buffers before forward, gradients of several dtypes (each has buckets of its own), unused
parameters, communication hooks. Source: `torch/csrc/distributed/c10d/reducer.cpp` and
`torch/nn/parallel/distributed.py` of PyTorch 2.14.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vdnn.values.node import Node
from vdnn.values.trace import Op, Storage, Trace

__all__ = ["BUCKET_BYTES", "FIRST_BUCKET_BYTES", "Bucket", "data_parallel", "grouped", "ready_gradients"]

FIRST_BUCKET_BYTES = 1 << 20
BUCKET_BYTES = 25 << 20


@dataclass(frozen=True, slots=True)
class Bucket:
    """Gradients that are summed over the ranks together.

    The sum may start at position `ready`, when the last of them is in; compute waits for it at position `wait`.
    """

    nbytes: int
    ready: int
    wait: int


def ready_gradients(trace: Trace) -> list[tuple[int, int]]:
    """Position at which each parameter's gradient is accumulated, and its storage, in that order.

    That is after the last op of backward that touches it, views too: a weight's gradient is transposed after its bias's
    has been handed over, though it was computed first.
    """
    begin, end = trace.forward_end, trace.backward_end
    last: dict[int, int] = {}
    for position in range(begin, end):
        for storage in trace.ops[position].reads + trace.ops[position].writes:
            last[storage] = position + 1
    seed: tuple[int, ...] = ()  # the gradient of the loss itself, which backward begins by making
    if begin < end and "ones_like" in trace.ops[begin].name:
        seed = trace.ops[begin].writes
    found = []
    for storage, position in last.items():
        s = trace.storages[storage]
        if s.category == "gradient" and s.free == len(trace.ops) and storage not in seed:
            found.append((position, storage))
    return sorted(found)


def grouped(sizes: Sequence[int]) -> list[list[int]]:
    """Which gradients, of these bytes in the order in which they get ready, make a bucket each."""
    groups: list[list[int]] = [[]]
    filled = 0
    for i, nbytes in enumerate(sizes):
        groups[-1].append(i)
        filled += nbytes
        if filled >= (BUCKET_BYTES if len(groups) > 1 else FIRST_BUCKET_BYTES):
            groups.append([])
            filled = 0
    return groups if groups[-1] else groups[:-1]


def data_parallel(trace: Trace, node: Node) -> tuple[Trace, tuple[Bucket, ...]]:
    """The step with its buckets, and these in the order in which they are summed; the trace itself for one GPU."""
    if node.gpus == 1:
        return trace, ()
    ready = ready_gradients(trace)
    groups = [[ready[i] for i in group] for group in grouped([trace.storages[s].nbytes for _, s in ready])]
    first = len(trace.storages)  # number of the first bucket's storage
    insert: list[tuple[int, int, Op]] = []  # position, bucket (−1: on the way in), op
    for number, group in enumerate(groups):
        insert += [(position, -1, _copy(trace, s, first + number, into=True)) for position, s in group]
        insert += [(trace.backward_end, number, _copy(trace, s, first + number, into=False)) for _, s in group]
    insert.sort(key=lambda item: item[:2])
    places = [position for position, _, _ in insert]

    def before(position: int) -> int:
        """Where the ops put in at a position begin."""
        return position + bisect_left(places, position)

    def after(position: int) -> int:
        """Where they have run."""
        return position + bisect_left(places, position + 1)

    ops = list(trace.ops)
    for position, _, op in reversed(insert):
        ops.insert(position, op)
    starts: dict[int, int] = {}  # bucket → where the copies out of it begin
    for i, (position, number, _) in enumerate(insert):
        if number >= 0:
            starts.setdefault(number, position + i)
    last_in: dict[int, int] = {}  # bucket → where the last copy into it has run
    for i, op in enumerate(ops):
        if op.name == COPY_IN:
            last_in[op.writes[0] - first] = i + 1
    sizes = [sum(trace.storages[s].nbytes for _, s in group) for group in groups]
    buckets = tuple(Bucket(size, last_in[n], starts[n]) for n, size in enumerate(sizes))
    storages = [
        replace(
            s,
            alloc=after(s.alloc) if s.alloc >= 0 else -1,
            release=before(s.release) if s.release >= 0 else s.release,
            need=after(s.need) if s.need >= 0 else -1,
            free=len(ops) if s.free == len(trace.ops) else before(s.free),
        )
        for s in trace.storages
    ]
    storages += [
        Storage(size, "gradient", f"bucket {n}", -1, len(ops), -1, len(ops), "") for n, size in enumerate(sizes)
    ]
    modules = tuple(
        replace(
            call,
            forward_begin=after(call.forward_begin),
            forward_end=after(call.forward_end),
            backward_begin=after(call.backward_begin) if call.backward_begin >= 0 else -1,
            backward_end=after(call.backward_end) if call.backward_end >= 0 else -1,
        )
        for call in trace.modules
    )
    saved = tuple(
        replace(t, packed_at=after(t.packed_at), unpacked_at=tuple(map(after, t.unpacked_at))) for t in trace.saved
    )
    return replace(trace, modules=modules, storages=tuple(storages), ops=tuple(ops), saved=saved), buckets


COPY_IN = "copy into bucket"


def _copy(trace: Trace, gradient: int, bucket: int, *, into: bool) -> Op:
    """One gradient into its bucket (divided by the number of ranks on the way), or the sum back from there."""
    nbytes = trace.storages[gradient].nbytes
    name, source, target = (COPY_IN, gradient, bucket) if into else ("copy from bucket", bucket, gradient)
    elements = nbytes // 4
    return Op(name, "backward", -1, "copy", "float32", (elements,), (source,), (target,), elements, nbytes, nbytes, 0)
