"""The engine executes a plan: what the plan names, where it says, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vdnn.engine import Schedule, VirtualDevice, engine_of, unwrap_model, wrap_model
from vdnn.errors import PlanMismatchError
from vdnn.values import Entry, Keep, Offload, Plan, SavedName

WIDTH, ROWS = 32, 16
NBYTES = WIDTH * ROWS * 4


def chain() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers), torch.randn(ROWS, WIDTH)


def plan(*entries: Entry, default: str = "keep") -> Plan:
    return Plan(
        policy="by hand",
        model="chain",
        batch=ROWS,
        device="cpu",
        trace="",
        budget_bytes=None,
        entries=entries,
        default=default,  # type: ignore[arg-type]
        min_bytes=1,
    )


def tanh_output(layer: int, action: Keep | Offload) -> Entry:
    """Tanh number `layer` saves its output; the Linear behind it saves the same storage as its input."""
    names = [SavedName(str(layer), 0, 0, "float32", 2, NBYTES)]
    if layer < 5:
        names.append(SavedName(str(layer + 1), 0, 0, "float32", 2, NBYTES))
    return Entry(tuple(names), NBYTES, action)


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


class Recording(VirtualDevice):
    """Writes down the calls that move bytes, and with how many packs behind them."""

    def __init__(self) -> None:
        super().__init__(seed=2)
        self.calls: list[str] = []

    def copy_out(self, block, buffer) -> None:
        self.calls.append("out")
        super().copy_out(block, buffer)

    def copy_back(self, buffer, block, at) -> None:
        self.calls.append("back")
        super().copy_back(buffer, block, at)

    def drop(self, buffer, reader=None) -> None:
        self.calls.append("drop")
        super().drop(buffer, reader)


def test_a_plan_moves_what_it_names_and_gradients_stay_the_same() -> None:
    model, x = chain()
    expected = step(copy.deepcopy(model), x)
    device = Recording()
    decided = plan(
        tanh_output(1, Offload("end 2#0", "unpack 5#0/0")),
        tanh_output(3, Keep("by hand")),
    )
    engine = wrap_model(model, device, lambda *a: Schedule(decided))
    got = step(model, x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    counts = engine.offloader.counts
    assert (counts.offloaded_storages, counts.offloaded_bytes) == (1, NBYTES)
    assert (counts.prefetched_storages, counts.fetched_storages) == (1, 0)
    assert counts.mismatches == []
    assert device.calls == ["out", "drop", "back", "drop"]


def test_without_a_prefetch_point_the_fetch_is_on_demand() -> None:
    model, x = chain()
    engine = wrap_model(model, VirtualDevice(), lambda *a: Schedule(plan(tanh_output(1, Offload("pack 3#0/0")))))
    step(model, x)
    counts = engine.offloader.counts
    assert (counts.prefetched_storages, counts.fetched_storages) == (0, 1)


def test_every_step_is_a_pass_also_when_idle_ones_lie_between() -> None:
    model, x = chain()
    moving, idle = Schedule(plan(tanh_output(1, Offload("end 2#0")))), Schedule(plan(tanh_output(1, Keep())))
    turns = iter([moving, idle, moving, moving, idle, idle, moving])
    seen: list[tuple[int, int]] = []
    engine = wrap_model(model, VirtualDevice(), lambda *a: next(turns))
    for _ in range(7):
        step(model, x)
        seen.append((engine.offloader.counts.passes, engine.offloader.counts.offloaded_storages))
    assert seen == [(1, 1), (2, 1), (3, 2), (4, 3), (5, 3), (6, 3), (7, 4)]


@pytest.mark.parametrize("where", ["before", "inside", "after"])
def test_a_model_may_be_unwrapped_by_a_hook_of_its_own(where: str) -> None:
    """torch calls hooks that are removed while hooks run all the same, without the arguments they asked for."""
    model, x = chain()
    plain = copy.deepcopy(model)
    device = VirtualDevice(seed=1)
    wrap_model(model, device, lambda *a: Schedule(plan(tanh_output(1, Offload("end 2#0")))))
    step(model, x)

    def unwrap(*_: object) -> None:
        unwrap_model(model)

    part = model[2] if where == "inside" else model
    register = part.register_forward_hook if where == "after" else part.register_forward_pre_hook
    handle = register(unwrap, prepend=True)
    found = step(model, x)
    handle.remove()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, step(plain, x), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert device.host_bytes()[0] == 0


def test_a_step_in_which_nothing_can_move_has_one_hook_on_the_model_and_none_on_autograd() -> None:
    model, x = chain()
    engine = wrap_model(model, VirtualDevice(), lambda *a: Schedule(plan(tanh_output(1, Keep()))))
    found: list[object] = []
    handle = model[3].register_forward_hook(
        lambda *_: found.append(torch._C._autograd._top_saved_tensors_default_hooks(True))
    )
    step(model, x)
    handle.remove()
    assert found == [None]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.children())
    assert engine.report().passes == 1


def test_a_storage_that_is_released_too_late_never_leaves() -> None:
    """Backward asks before the release point was reached: the original is still there, and nothing comes back."""
    model, x = chain()
    device = Recording()
    wrap_model(model, device, lambda *a: Schedule(plan(tanh_output(1, Offload("end nowhere#0")))))
    step(model, x)
    assert "back" not in device.calls
    assert device.host_bytes()[0] == 0


@pytest.mark.case(52)
@pytest.mark.parametrize("wait_at", ["", "unpack 3#0/0"])
def test_several_storages_in_flight_come_back_in_the_planned_order(wait_at: str) -> None:
    model, x = chain()
    expected = step(copy.deepcopy(model), x)
    decided = plan(
        tanh_output(1, Offload("end 2#0", "unpack 4#0/0", wait_at)),
        tanh_output(3, Offload("end #0", "unpack 5#0/0", wait_at)),
    )
    for seed in range(4):
        twin = copy.deepcopy(model)
        engine = wrap_model(twin, VirtualDevice(seed=seed), lambda *a: Schedule(decided))
        got = step(twin, x)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert engine.offloader.counts.prefetched_storages == 2


def test_a_saved_tensor_that_differs_from_the_plan_stays_and_is_reported() -> None:
    model, x = chain()
    wrong = SavedName("1", 0, 0, "float32", 2, NBYTES * 2)
    decided = plan(Entry((wrong,), NBYTES * 2, Offload("end 2#0")), tanh_output(3, Offload("end 4#0")))
    engine = wrap_model(model, VirtualDevice(), lambda *a: Schedule(decided))
    step(model, x)
    counts = engine_of(model).offloader.counts
    assert counts.offloaded_storages == 1
    (mismatch,) = counts.mismatches
    assert mismatch == (
        f"1#0/0 was planned as float32 of rank 2 and {2 * NBYTES} bytes, but is float32 of rank 2 and {NBYTES} bytes"
    )
    assert "not as planned     1 saved tensors" in str(engine.report())


def test_a_plan_for_another_model_is_refused_by_the_name_of_the_module() -> None:
    model, _ = chain()
    decided = plan(Entry((SavedName("features.0", 0, 0, "float32", 2, 8),), 8, Keep()))
    with pytest.raises(PlanMismatchError, match=r"names module .features\.0., which this model does not have"):
        Schedule(decided).check_names({name for name, _ in model.named_modules()})
