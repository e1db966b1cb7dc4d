"""Many orders of events over many networks: each gives the numbers of the plain model, no race, and no byte left."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from tests.networks import FEATURES, ROWS, WIDTH, Network, Program, Streams, networks
from vdnn.calls import ModuleCalls
from vdnn.engine import Rule, Schedule, VirtualDevice, engine_of, unwrap_model, wrap_model
from vdnn.engine.device import Buffer
from vdnn.engine.virtual.order import Stream
from vdnn.values import Entry, Keep, Offload, Plan, SavedName

ONE = 4 * ROWS * WIDTH  # bytes of a value of a network

# What a plan does with one storage after the other, in turn: the points are numbers of saved tensors, counted from the
# storage's own; None: no such point. A point may well be senseless (a wait before the prefetch), and must do no harm.
Choice = tuple[bool, int | None, int | None, int | None]
_POINT = st.none() | st.integers(0, 6)
plans = st.lists(st.tuples(st.booleans(), _POINT, _POINT, _POINT), min_size=1, max_size=4)

rules = st.builds(
    Rule,
    min_bytes=st.sampled_from([1, ONE]),
    max_inflight_bytes=st.sampled_from([0, ONE, 3 * ONE, 1 << 20]),
    ahead_bytes=st.sampled_from([0, ONE, 3 * ONE, 1 << 20]),
)


@dataclass
class Explored:
    """What was seen so far."""

    runs: int = 0
    networks: int = 0
    planned: int = 0
    moved: int = 0
    with_several_orders: int = 0
    orders: set[bytes] = field(default_factory=set)
    features: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"{self.runs} runs of {self.networks} networks ({self.planned} by plan, the others by rule): "
            f"{len(self.orders)} distinct orders of events, "
            f"{self.with_several_orders} networks with more than one order, {self.moved} storages moved; "
            "networks with " + ", ".join(f"{name} {self.features[name]}" for name in FEATURES)
        )


class Noting(VirtualDevice):
    """Notes all memory that the engine was given or made."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self._noted: list[StorageWeakRef] = []

    def adopt(self, tensor: torch.Tensor, *rest: Any) -> Buffer:
        self._noted.append(StorageWeakRef(tensor.untyped_storage()))
        return super().adopt(tensor, *rest)

    def allocate(self, *which: Any) -> Buffer:
        buffer = super().allocate(*which)
        assert buffer.data is not None
        self._noted.append(StorageWeakRef(buffer.data.untyped_storage()))
        return buffer

    def left(self, besides: torch.Tensor) -> int:
        """How many of them are still there, one that the caller holds aside."""
        held = besides.untyped_storage()._cdata
        return sum(not weak.expired() and weak.cdata != held for weak in self._noted)


def numbers(model: Network, x: torch.Tensor) -> list[torch.Tensor]:
    """Losses, gradients and running statistics of one step from the same start."""
    torch.manual_seed(1)
    model.norm.reset_running_stats()
    losses = model(x)
    model.backward(losses)
    tensors = [*(loss.detach() for loss in losses), *model.norm.buffers(), x.grad]
    tensors += [parameter.grad for parameter in model.parameters()]
    found = [torch.empty(0) if tensor is None else tensor.clone() for tensor in tensors]
    model.zero_grad()
    x.grad = None
    return found


def plan_for(model: Network, x: torch.Tensor, choices: list[Choice]) -> Plan:
    """A plan whose names and points are those of the model's own step."""
    names: list[SavedName] = []
    storages: dict[int, list[int]] = {}
    held: list[torch.Tensor] = []  # as long as they live, no two storages have one address
    calls = ModuleCalls(model)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        frame = calls.current
        assert frame is not None
        dtype = str(tensor.dtype).removeprefix("torch.")
        storages.setdefault(tensor.untyped_storage()._cdata, []).append(len(names))
        names.append(SavedName(frame.fqn, frame.call, frame.packs, dtype, tensor.dim(), tensor.nbytes))
        held.append(tensor.detach())
        frame.packs += 1
        return tensor

    calls.attach()
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    calls.detach()
    entries = []
    for (moves, release, prefetch, wait), group in zip(cycle(choices), storages.values(), strict=False):
        at = [names[min(group[-1] + n, len(names) - 1)] if n is not None else None for n in (release, prefetch, wait)]
        own = names[group[-1]]
        action = Offload(
            f"pack {at[0]}" if at[0] is not None else f"end {own.module}#{own.call}",
            f"unpack {at[1]}" if at[1] is not None else "",
            f"unpack {at[2]}" if at[2] is not None else "",
        )
        tensors = tuple(names[n] for n in group)
        entries.append(Entry(tensors, max(name.nbytes for name in tensors), action if moves else Keep()))
    return Plan("drawn", "network", ROWS, "cpu", "", None, tuple(entries), "keep", 1)


def explore(program: Program, how: Rule | list[Choice], seeds: range, explored: Explored) -> None:
    """One network under one rule or plan, late copies by another chance for each seed; until nothing new comes."""
    torch.manual_seed(0)
    model, x = Network(program), torch.randn(ROWS, WIDTH, requires_grad=True)
    expected = numbers(model, x)
    assert all(tensor.isfinite().all() for tensor in expected), f"a wrong number could hide: {program}"
    schedule = Schedule(None, how) if isinstance(how, Rule) else Schedule(plan_for(model, x, how))
    explored.planned += not isinstance(how, Rule)
    orders: set[bytes] = set()
    old = 0  # runs in a row whose order was known
    for seed in seeds:
        device = Noting(seed)
        model.streams = Streams(device, (Stream("stream 1"), Stream("stream 2")))
        wrap_model(model, device, lambda *_: schedule)
        # the full account watches every op and takes as long as everything else: once for each network
        with device if seed == seeds[0] else contextlib.nullcontext():
            for tensor in (x, *model.parameters(), *model.buffers()):
                device.account.add(tensor)
            start = device.account.live_bytes()
            got = numbers(model, x)
            device.finish()
        explored.moved += engine_of(model).offloader.counts.offloaded_storages
        unwrap_model(model)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), (program, how, seed)
        del got
        if device.left(x) or device.account.live_bytes() != start:
            gc.collect()  # a checkpoint leaves frames that hold each other
        assert device.left(x) == 0, (program, how, seed)
        assert device.account.live_bytes() == start, (program, how, seed)
        assert device.host_bytes()[0] == 0, (program, how, seed)
        explored.runs += 1
        old = old + 1 if device.execution.digest() in orders else 0
        orders.add(device.execution.digest())
        if old == 4:
            break
    explored.networks += 1
    explored.with_several_orders += len(orders) > 1
    explored.orders |= orders
    explored.features.update(program.features())


def explored(examples: int, seeds: int) -> Explored:
    """So many networks, with so many seeds each."""
    found = Explored()

    @settings(
        max_examples=examples,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
        deadline=None,
    )
    @given(networks(), rules | plans)
    def run(program: Program, how: Rule | list[Choice]) -> None:
        explore(program, how, range(seeds), found)

    run()
    return found


@pytest.mark.case(16, 17, 21, 22)
def test_many_orders_give_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    found = explored(30, 10)
    with capsys.disabled():
        print(f"\n{found}; {time.monotonic() - start:.0f} s")
    assert len(found.orders) > 100
    assert found.with_several_orders > found.networks // 3
    assert set(found.features) == set(FEATURES)


@pytest.mark.case(16, 17, 21, 22)
@pytest.mark.slow
def test_ten_thousand_orders_give_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    found = explored(500, 60)
    with capsys.disabled():
        print(f"\n{found}; {time.monotonic() - start:.0f} s")
    assert len(found.orders) >= 10_000
