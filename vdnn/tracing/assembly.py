"""From what a capture recorded to a `Trace`: lifetimes and categories of storages, ranges of module calls."""

from __future__ import annotations

from typing import Any

import torch

from vdnn.tracing.recorder import Recorder
from vdnn.values import ModuleCall, Recipe, SavedTensor, Storage, Trace

__all__ = ["assembled"]


def assembled(
    capture: Any,
    name: str,
    batch: int,
    precision: str,
    optimizer: str,
    device: str,
    channels_last: bool,
    options: tuple[tuple[str, str], ...],
    corrections: list[str],
    recipe: Recipe,
) -> Trace:
    rec = capture.recorder
    n = len(rec.ops)
    forward_end = next((i for i, op in enumerate(rec.ops) if op.phase != "forward"), n)
    for parameter in capture.model.parameters():
        if parameter.grad is not None and parameter.grad.device.type == capture.device:
            rec.stores[rec.store_of(parameter.grad)].category = "gradient"
    spans: dict[int, list[int]] = {}
    for i, op in enumerate(rec.ops):
        if op.phase == "backward":
            module = op.module
            while module >= 0:
                span = spans.setdefault(module, [i, i + 1])
                span[1] = i + 1
                module = capture.calls[module][4]
    for index, (begin, end) in spans.items():
        capture.calls[index][7:9] = [begin, end]
    first_use = _first_uses(rec)
    kept = _kept_by_autograd(capture, n)
    storages = []
    for number, store in enumerate(rec.stores):
        died = n if store.dead is None else store.dead
        free = max(died, store.free or 0, kept.get(number, 0))
        if store.restored is not None and store.restored() is not None:
            free = n  # what backward was given lives on
        alloc = store.alloc
        category = store.category
        if not category:
            if alloc < 0:
                category = "input"
            elif store.packed or (alloc < forward_end < died):
                category = "activation"
            else:
                category = "temporary"
        if alloc >= 0 and number in first_use:
            alloc = min(alloc, first_use[number])
        storages.append(
            Storage(
                nbytes=store.nbytes,
                category=category,
                name=store.name,
                alloc=alloc,
                release=died,
                need=store.need,
                free=max(free, alloc + 1),
                held=store.held,
            )
        )
    modules = tuple(ModuleCall(*row) for row in capture.calls)
    saved = tuple(
        SavedTensor(
            module=p.module,
            index=p.index,
            storage=p.store,
            dtype=p.form[0],
            shape=p.form[1],
            stride=p.form[2],
            offset=p.form[3],
            nbytes=p.form[4],
            packed_at=p.packed_at,
            unpacked_at=tuple(p.unpacked_at),
            node=p.node,
        )
        for p in capture.saved
    )
    trace = Trace(
        model=name,
        batch=batch,
        precision=precision,
        optimizer=optimizer,
        device=device,
        channels_last=channels_last,
        options=options,
        torch=str(torch.__version__),
        corrections=tuple(corrections),
        modules=modules,
        storages=tuple(storages),
        ops=tuple(rec.ops),
        saved=saved,
        recipe=recipe,
    )
    trace.check()
    return trace


def _kept_by_autograd(capture: Any, end: int) -> dict[int, int]:
    """Where autograd lets go of the last saved tensor in each storage.

    A node that backward does not run keeps what it saved as long as the graph lives, which is to the end of the
    step; unless something else asked for it, as checkpointing does for its inputs.
    """
    kept: dict[int, int] = {}
    for packed, standin in zip(capture.saved, capture.standins, strict=True):
        if standin is None:
            continue
        until = packed.released
        if until is None:
            until = max(packed.unpacked_at) if packed.unpacked_at else end
        kept[packed.store] = max(kept.get(packed.store, 0), until)
    return kept


def _first_uses(rec: Recorder) -> dict[int, int]:
    found: dict[int, int] = {}
    for i, op in enumerate(rec.ops):
        for number in op.reads + op.writes:
            found.setdefault(number, i)
    return found
