"""What people have today, as far as it decides a step's memory and time: PyTorch's `save_on_cpu`, torchtune's hooks.

Both wrap the model's forward in hooks (the loss is outside) and copy what autograd saves, tensor by tensor. Only the
simulator executes such a plan (`vdnn.analysis.tensorwise` says in which order). Read in the sources of PyTorch 2.14
(`torch/autograd/graph.py`) and torchtune (`training/_activation_offloading.py`, April 2026).

Not in it: a strided view is gathered on the device before it is copied (a temporary of its size); the Python time of
the hooks; the end of the host's run-ahead, when CUDA's queue of launches is full; pinning itself, which the first step
pays (about 3 ms a tensor); `record_stream` where a gradient is a view of what was unpacked; torchtune's `NoOpManager`
around the last linear layer of its own models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from vdnn.analysis.moments import Points
from vdnn.errors import UsageError
from vdnn.policies.options import Options
from vdnn.policies.plans import make_plan
from vdnn.policies.registry import register
from vdnn.units import format_bytes
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Copy, Entry, Keep, Plan
from vdnn.values.trace import SavedTensor, Storage, Trace

__all__ = ["MIN_BYTES", "STASH", "save_on_cpu", "torchtune"]

MIN_BYTES = 1024  # torchtune's min_offload_size
STASH = 5  # torchtune's max_fwd_stash_size


@register("save-on-cpu", engine=False)
def save_on_cpu(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """`torch.autograd.graph.save_on_cpu(pin_memory=True)`: every saved tensor, weights too, on the compute stream."""
    return _plan("save-on-cpu", trace, options, Copy("compute"), lambda t: "" if t.nbytes else "holds no bytes")


@register("torchtune", engine=False)
def torchtune(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """`OffloadActivations()`: from 1024 bytes on, on one side stream, parameters themselves not but views of them."""

    def keep(t: SavedTensor) -> str:
        if t.nbytes < MIN_BYTES:
            return f"smaller than {MIN_BYTES} bytes"
        return "a parameter itself" if _is_parameter(trace, t) else ""

    plan = _plan("torchtune", trace, options, Copy("side", STASH), keep)
    inside = [t for t in trace.saved if t.module >= 0]
    never, again = (sum(test(t) for t in inside) for test in (_never_asked, _asked_again))
    if never:
        note = f"torchtune raises at its second forward: backward never asks for {never} of the tensors it holds"
        plan = replace(plan, notes=(*plan.notes, note))
    if again:
        note = f"torchtune raises in backward, which asks for {again} saved tensors a second time; counted once here"
        plan = replace(plan, notes=(*plan.notes, note))
    return plan


def _never_asked(t: SavedTensor) -> bool:
    return not t.unpacked_at


def _asked_again(t: SavedTensor) -> bool:
    return len(t.unpacked_at) > 1


def _of_weights(storage: Storage) -> bool:
    return storage.category in ("parameter", "buffer") or storage.name.startswith("cast of")


def _is_parameter(trace: Trace, t: SavedTensor) -> bool:
    """Whether it is the parameter and no view: all of its storage, rows first or channels last. `weight.t()` is not."""
    s = trace.storages[t.storage]
    if s.category != "parameter" or t.offset or t.nbytes != s.nbytes:
        return False
    order = list(range(len(t.shape)))
    orders = [order] if len(order) < 3 else [order, [0, *order[2:], 1]]
    return any(_dense(t, axes) for axes in orders)


def _dense(t: SavedTensor, axes: list[int]) -> bool:
    """Whether the axes lie in memory in that order; an axis of one element lies anywhere."""
    shape = [t.shape[axis] for axis in axes]
    return all(t.shape[axis] == 1 or t.stride[axis] == math.prod(shape[place + 1 :]) for place, axis in enumerate(axes))


def _plan(policy: str, trace: Trace, options: Options, how: Copy, keep: Callable[[SavedTensor], str]) -> Plan:
    if options.regime == "paper":
        raise UsageError(f"policy {policy} is PyTorch's: there is none in the paper's Torch7, leave --regime paper out")
    names, entries = Points(trace).names, []
    copied = weights = 0
    unique: set[int] = set()
    for name, t in zip(names, trace.saved, strict=True):
        why = "saved outside the model (by the loss), where the hooks are not" if t.module < 0 else keep(t)
        entries.append(Entry((name,), trace.storages[t.storage].nbytes, Keep(why) if why else how))
        if not why:
            copied += t.nbytes
            unique.add(t.storage)
            weights += t.nbytes if _of_weights(trace.storages[t.storage]) else 0
    moved = sum(not isinstance(entry.action, Keep) for entry in entries)
    note = (
        f"copies {format_bytes(copied)} in {moved} tensors of {len(unique)} storages, "
        f"{format_bytes(weights)} of them weights, their low-precision copies and buffers"
    )
    plan = make_plan(policy, trace, options, {}, {}, notes=(note,))
    return replace(plan, entries=tuple(entries)) if moved else plan
