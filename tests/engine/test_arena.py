"""Host memory that is laid out from a plan: one piece, exact, the same step after step and shape after shape."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import vdnn
from vdnn.engine import Schedule, VirtualDevice, unwrap_model, wrap_model
from vdnn.engine.arena import Arena
from vdnn.engine.hostpool import PAGE_BYTES, HostPool
from vdnn.values import Entry, Offload, Plan, SavedName


def plan_of(*sizes: int, whole: bool = True) -> Schedule:
    """A plan that moves storages of these sizes."""
    entries = [
        Entry((SavedName(str(n), 0, 0, "uint8", 1, size),), size, Offload(f"end {n}#0", whole=whole))
        for n, size in enumerate(sizes)
    ]
    return Schedule(Plan("by hand", "bytes", 1, "cpu", "", None, tuple(entries)))


def network(layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(64, 64), nn.GELU())))


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def by_shape(model: nn.Module):
    """A plan for each batch, which moves every feature map."""
    made: dict[int, Schedule] = {}

    def schedule_for(module: nn.Module, args: tuple[torch.Tensor], kwargs: object) -> Schedule:
        batch = args[0].shape[0]
        if batch not in made:
            trace = vdnn.capture(model, args[0], device="cpu")
            made[batch] = Schedule(vdnn.plan(trace, "rtx4090", "vdnn-all", min_bytes=1))
        return made[batch]

    return made, schedule_for


@given(st.lists(st.integers(1, 3 * PAGE_BYTES), min_size=1, max_size=30))
def test_blocks_are_disjoint_aligned_and_their_sum_is_what_is_reserved(sizes: list[int]) -> None:
    pool = HostPool(None)
    arena = Arena(pool)
    assert arena.lay_out(plan_of(*sizes)) == []
    blocks = [arena.take(entry, size) for entry, size in enumerate(sizes)]
    spans = sorted((block.data.data_ptr(), block.data.data_ptr() + block.nbytes) for block in blocks)
    assert all(end <= first for (_, end), (first, _) in pairwise(spans))
    assert all(first % 64 == 0 for first, _ in spans)
    assert pool.allocations == 1
    assert pool.reserved_bytes < sum(sizes) + 64 * len(sizes) + PAGE_BYTES


def test_a_block_in_use_or_too_small_is_not_given() -> None:
    arena = Arena(HostPool(None))
    arena.lay_out(plan_of(100, 200))
    assert arena.take(0, 300) is None
    assert arena.take(7, 100) is None
    block = arena.take(0, 100)
    assert block is not None
    assert arena.take(0, 100) is None


def test_each_view_that_moves_by_itself_has_a_block() -> None:
    names = tuple(SavedName("0", 0, n, "uint8", 1, size) for n, size in enumerate((100, 1000)))
    entry = Entry(names, 4096, Offload("end 0#0", whole=False))
    arena = Arena(HostPool(None))
    arena.lay_out(Schedule(Plan("by hand", "views", 1, "cpu", "", None, (entry,))))
    first, second = arena.take(0, 900), arena.take(0, 90)
    assert first is not None
    assert second is not None
    assert arena.take(0, 10) is None


@pytest.mark.case(50, 51)
def test_memory_is_pinned_once_and_is_what_the_plan_moves() -> None:
    """Bytes pinned are within 2 % of those that are on the host at once, and none are pinned after the first step."""
    model, x = network(8), torch.randn(512, 64)
    expected = gradients(model, x)
    pinned: list[int] = []
    device = VirtualDevice()
    device._pool = HostPool(lambda data: pinned.append(data.numel()) or data)
    made, schedule_for = by_shape(model)
    wrap_model(model, device, schedule_for)
    for _ in range(4):
        got = gradients(model, x)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    use = device.host_bytes()
    unwrap_model(model)
    assert device.host_bytes().reserved_bytes == 0
    (schedule,) = made.values()
    assert schedule.plan.offloaded_bytes <= sum(pinned) <= 1.02 * schedule.plan.offloaded_bytes
    assert len(pinned) == use.allocations == 1
    assert use.pinned_bytes == use.reserved_bytes == sum(pinned)
    assert use.peak_bytes <= use.pinned_bytes
    assert use.used_bytes == 0


@pytest.mark.case(50, 51)
def test_plans_of_several_shapes_use_one_piece_as_large_as_the_largest_needs() -> None:
    model = network()
    device = VirtualDevice(seed=2)
    made, schedule_for = by_shape(model)
    batches = (32, 256, 64, 256, 128, 32)
    inputs = [torch.randn(batch, 64) for batch in batches]
    expected = [gradients(model, x) for x in inputs]
    wrap_model(model, device, schedule_for)
    reserved = []
    for _ in range(2):
        for x, want in zip(inputs, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), want, strict=True))
            reserved.append(device.host_bytes().reserved_bytes)
    device.finish()
    unwrap_model(model)
    largest = max(schedule.plan.offloaded_bytes for schedule in made.values())
    assert reserved[0] < reserved[1]
    assert set(reserved[1:]) == {reserved[1]}
    assert largest <= reserved[1] <= 1.02 * largest + PAGE_BYTES
    assert device.host_bytes().allocations == 2


@pytest.mark.case(10, 50)
def test_two_forwards_before_two_backwards_of_one_plan_take_other_blocks() -> None:
    model = network()
    one, two = torch.randn(128, 64), torch.randn(128, 64)
    expected = [gradients(model, x) for x in (one, two)]
    device = VirtualDevice(seed=1)
    wrap_model(model, device, by_shape(model)[1])
    taken = []
    for _ in range(3):
        model.zero_grad()
        losses = [model(x).square().sum() for x in (one, two)]
        for loss, want in zip(losses, expected, strict=True):
            model.zero_grad()
            loss.backward()
            assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), want, strict=True))
        del loss, losses
        taken.append(device.host_bytes().allocations)
    device.finish()
    unwrap_model(model)
    assert taken[1:] == taken[:1] * 2
    assert device.host_bytes().used_bytes == 0


def test_another_shape_between_a_forward_and_its_backward_leaves_the_first_ones_bytes_alone() -> None:
    model = network()
    one, two = torch.randn(128, 64), torch.randn(32, 64)
    expected = [gradients(model, x) for x in (one, two)]
    device = VirtualDevice(seed=4)
    wrap_model(model, device, by_shape(model)[1])
    for _ in range(2):
        loss = model(one).square().sum()
        assert all(torch.equal(a, b) for a, b in zip(gradients(model, two), expected[1], strict=True))
        model.zero_grad()
        loss.backward()
        assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), expected[0], strict=True))
    unwrap_model(model)


@pytest.mark.case(42)
def test_a_block_that_is_lost_costs_a_new_piece_of_memory_and_nothing_else() -> None:
    """A KeyboardInterrupt may come between taking a block and owning it; a copy may be on its way to its bytes."""
    pool = HostPool(None)
    arena = Arena(pool)
    schedule = plan_of(5000, 6000)
    arena.lay_out(schedule)
    kept = arena.take(1, 6000)
    assert arena.take(0, 5000) is not None  # and nobody has it
    assert arena.lay_out(schedule) == []
    assert pool.allocations == 2
    assert arena.take(0, 5000) is not None
    assert kept is not None
    pool.give_back(kept, None)
    del kept
    assert pool.sizes().used_bytes == 0
    assert pool.sizes().reserved_bytes < 12000 + PAGE_BYTES


def test_where_the_budget_has_no_room_for_all_of_it_the_rest_stays_on_the_device() -> None:
    model, x = network(), torch.randn(256, 64)
    expected = gradients(model, x)
    device = VirtualDevice(host_budget=5 * 256 * 64 * 4)
    wrapped = wrap_model(model, device, by_shape(model)[1])
    with pytest.warns(UserWarning, match="host budget"):
        got = gradients(model, x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), expected, strict=True))
    unwrap_model(model)
    counts = wrapped.offloader.counts
    assert counts.host_full > 0
    assert counts.offloaded_storages > 0
    assert device.host_bytes().reserved_bytes <= 5 * 256 * 64 * 4


def test_host_memory_is_the_hosts_whatever_the_default_device_is() -> None:
    """Under `torch.set_default_device` blocks lay where new tensors do: on the device that was to be relieved."""
    with torch.device("meta"):
        block = HostPool(None).take(100)
    assert block is not None
    assert block.data.device.type == "cpu"
