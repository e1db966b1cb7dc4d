"""What a trace, a plan and a machine come to, as rows: rendered by text, JSON and figures alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vdnn.values import Copy, Encode, Hardware, Keep, Offload, Plan, Recompute, Trace

__all__ = [
    "LayerShare",
    "ModuleShare",
    "PlanRow",
    "TraceSummary",
    "as_rows",
    "hardware_row",
    "layer_shares",
    "plan_head",
    "plan_rows",
    "summarise",
]

# Saved storages of these categories belong to the model and stay where they are; all others are feature maps.
_OF_THE_MODEL = ("parameter", "buffer", "optimizer_state")


def as_rows(records: Iterable[Any]) -> list[dict[str, Any]]:
    """The JSON rows of summary records."""
    return [dataclasses.asdict(record) for record in records]


# -- trace ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModuleShare:
    """The feature maps that are first saved inside one module call."""

    module: str
    type: str
    storages: int
    nbytes: int
    percent: float


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """One training step in a few numbers.

    `saved_bytes` adds up saved tensors, `unique_bytes` the storages that they share: only the second occupies
    memory. Both leave out parameters and buffers, which autograd saves too. `held_bytes` is the part of the
    unique bytes that someone else holds (outputs): offloading it would free nothing. `categories` adds up, by
    category, all storages that are there before the step.
    """

    model: str
    batch: int
    precision: str
    optimizer: str
    device: str
    torch: str
    forward_ops: int
    backward_ops: int
    optimizer_ops: int
    flops: int
    storages: int
    saved_tensors: int
    saved_storages: int
    saved_bytes: int
    unique_bytes: int
    held_bytes: int
    categories: tuple[tuple[str, int], ...]
    corrections: tuple[str, ...]
    modules: tuple[ModuleShare, ...]


def summarise(trace: Trace) -> TraceSummary:
    """A trace in a few numbers, with every module call that saves feature maps, largest first."""
    maps = [t for t in trace.saved if trace.storages[t.storage].category not in _OF_THE_MODEL]
    first_saver: dict[int, int] = {}
    for tensor in maps:
        first_saver.setdefault(tensor.storage, tensor.module)
    unique = sum(trace.storages[s].nbytes for s in first_saver)
    shares: dict[int, list[int]] = {}
    for storage, module in first_saver.items():
        shares.setdefault(module, []).append(trace.storages[storage].nbytes)
    modules = [
        ModuleShare(
            trace.module_name(module),
            trace.modules[module].type if module >= 0 else "",
            len(sizes),
            sum(sizes),
            100 * sum(sizes) / unique if unique else 0.0,
        )
        for module, sizes in shares.items()
    ]
    resident: dict[str, int] = {}
    for s in trace.storages:
        if s.alloc == -1:
            resident[s.category] = resident.get(s.category, 0) + s.nbytes
    return TraceSummary(
        model=trace.model,
        batch=trace.batch,
        precision=trace.precision,
        optimizer=trace.optimizer,
        device=trace.device,
        torch=trace.torch,
        forward_ops=trace.forward_end,
        backward_ops=trace.backward_end - trace.forward_end,
        optimizer_ops=len(trace.ops) - trace.backward_end,
        flops=sum(op.flops for op in trace.ops),
        storages=len(trace.storages),
        saved_tensors=len(maps),
        saved_storages=len(first_saver),
        saved_bytes=sum(t.nbytes for t in maps),
        unique_bytes=unique,
        held_bytes=sum(trace.storages[s].nbytes for s in first_saver if trace.storages[s].held),
        categories=tuple(sorted(resident.items())),
        corrections=trace.corrections,
        modules=tuple(sorted(modules, key=lambda m: (-m.nbytes, m.module))),
    )


# -- plan ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlanRow:
    """What a plan does with one storage: `moved_bytes` leave the device, of `storage_bytes`."""

    module: str
    saved: str
    action: str
    storage_bytes: int
    moved_bytes: int
    release_at: str
    prefetch_at: str
    wait_at: str
    why: str


def plan_rows(plan: Plan) -> tuple[PlanRow, ...]:
    """The entries of a plan, in its order, each under the module that packs it first."""
    found = []
    for entry in plan.entries:
        first, action = entry.saved[0], entry.action
        module, nbytes = f"{first.module or '<model>'}#{first.call}", entry.storage_bytes
        points = ("", "", "")
        if isinstance(action, Offload | Encode):
            points = (action.release_at, action.prefetch_at, action.wait_at)
        why = action.why if isinstance(action, Keep | Recompute) else ""
        if isinstance(action, Encode):
            why = f"{entry.code_bytes} bytes are enough ({action.how}): {action.why}"
        found.append(PlanRow(module, str(first), action.action, nbytes, entry.moved_bytes, *points, why))
    return tuple(found)


def plan_head(plan: Plan) -> dict[str, Any]:
    """What a plan is, beside its entries, as a JSON row."""
    names = ("policy", "model", "batch", "device", "budget_bytes", "offloaded_bytes", "default", "min_bytes")
    return {**{name: getattr(plan, name) for name in names}, "notes": list(plan.notes)}


@dataclass(frozen=True, slots=True)
class LayerShare:
    """The feature maps of one layer under a plan, in bytes of storage; those of a code where one stands for it."""

    layer: str
    kept_bytes: int
    offloaded_bytes: int


def layer_shares(plan: Plan, trace: Trace) -> tuple[LayerShare, ...]:
    """Kept and offloaded bytes of each layer that saves feature maps, in the order of forward.

    A storage that the plan does not name follows the plan's default.
    """
    decided = {(n.module, n.call, n.index): entry for entry in plan.entries for n in entry.saved}
    done: set[int] = set()
    layers: dict[str, list[int]] = {}
    for tensor in trace.saved:
        storage = trace.storages[tensor.storage]
        if tensor.storage in done or storage.category in _OF_THE_MODEL:
            continue
        done.add(tensor.storage)
        entry = None
        if tensor.module >= 0:
            call = trace.modules[tensor.module]
            entry = decided.get((call.fqn, call.call, tensor.index))
        if entry is not None:
            moves = isinstance(entry.action, Offload | Copy)
        else:
            moves = plan.default == "offload" and storage.nbytes >= plan.min_bytes and not storage.held
        sums = layers.setdefault(trace.module_name(tensor.module), [0, 0])
        if entry is not None and entry.code_bytes is not None:
            sums[bool(entry.moved_bytes)] += entry.code_bytes
        else:
            sums[moves] += storage.nbytes
    return tuple(LayerShare(layer, kept, offloaded) for layer, (kept, offloaded) in layers.items())


# -- hardware ------------------------------------------------------------------------------------


def hardware_row(machine: Hardware) -> dict[str, Any]:
    """A machine as a JSON row: its numbers, without their sources."""
    return {
        "id": machine.id,
        "name": machine.name,
        "memory_bytes": machine.memory_bytes,
        "available_bytes": machine.available_bytes,
        "float32_flops_per_s": machine.peak("float32"),
        "float16_flops_per_s": machine.peak("float16"),
        "dram_bytes_per_s": machine.dram_bytes_per_s,
        "d2h_bytes_per_s": machine.d2h_bytes_per_s,
        "h2d_bytes_per_s": machine.h2d_bytes_per_s,
        "duplex_bytes_per_s": machine.duplex_bytes_per_s,
    }
