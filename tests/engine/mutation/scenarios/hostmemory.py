"""Host memory that is laid out from plans: whoever gets bytes that others had waits for the copies there."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from tests.engine.mutation.scenarios.base import chain, expect, scenario
from tests.engine.mutation.scenarios.threads import in_thread, watched_scenario
from vdnn.values import Entry, Offload, Plan, SavedName


def by_shape(engine: ModuleType) -> Any:
    """A plan for each number of rows: every Tanh's output moves, and all come back where the last one is asked for."""
    made: dict[int, Any] = {}

    def schedule_for(model: object, args: tuple[torch.Tensor], kwargs: object) -> Any:
        rows = args[0].shape[0]
        if rows not in made:
            nbytes = 4 * 16 * rows
            entries = [
                Entry(
                    tuple(SavedName(str(at), 0, 0, "float32", 2, nbytes) for at in (layer, layer + 1) if at < 6),
                    nbytes,
                    Offload(f"end {layer}#0", "unpack 5#0/0"),
                )
                for layer in (1, 3, 5)
            ]
            made[rows] = engine.Schedule(Plan("by hand", "chain", rows, "cpu", "", None, tuple(entries), "keep", 1))
        return made[rows]

    return schedule_for


@scenario
def plans_of_two_shapes_take_turns_while_copies_back_are_late(engine: ModuleType) -> None:
    """A graph is dropped with its copies back on their way; the next shape's blocks lie across the last one's."""
    device = engine.VirtualDevice(seed=3)
    model, x = chain()
    wrapped = engine.wrap_model(model, device, by_shape(engine))
    for rows in (8, 6, 8, 6):
        loss = model(x[:rows]).sum()
        last = loss.grad_fn.next_functions[0][0]
        assert last is not None
        _ = last._saved_result  # type: ignore[attr-defined]
        del loss, last, _
    loss = model(x).sum()
    loss.backward()
    del loss
    device.finish()
    engine.unwrap_model(model)
    expect(wrapped.offloader.counts.offloaded_storages == 15, "not every plan moved its three storages")
    expect(device.host_bytes().allocations == 1, f"{device.host_bytes().allocations} pieces of host memory, not one")
    expect(device.host_bytes().used_bytes == 0, "host memory is still in use")


@watched_scenario
def an_arena_in_threads_one_after_the_other(engine: ModuleType) -> None:
    """A model may run its forwards in one thread after the other."""
    device, schedules = engine.VirtualDevice(), by_shape(engine)
    arena = device.host_arena()

    def run(rows: int) -> None:
        arena.lay_out(schedules(None, (torch.empty(rows),), None))
        arena.settled()
        device.give_back(arena.take(0, 64 * rows), device.record(device.prefetch_stream))

    for rows in (8, 6, 4, 8, 8):
        in_thread(lambda rows=rows: run(rows))
    for work in (lambda: device.give_back(device.host_block(64), None), device.trim, device.trim):
        in_thread(work)
    expect(device.host_bytes().allocations == 2, "not one slab for the plans and one for the block")
