"""What two threads touch has a lock of its own. The threads run one after the other: the check is of lock sets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn

from tests.engine.mutation.locksets import Monitor
from tests.engine.mutation.scenarios.base import by_rule, chain
from vdnn.values import Encode, Entry, Offload, Plan, Recompute, SavedName

__all__ = ["WATCHED", "in_thread", "races_in"]

WATCHED: dict[str, Callable[[ModuleType], None]] = {}  # scenarios for an engine whose accesses are watched


def watched_scenario(function: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """Put a scenario on the list of those that run on a watched engine; the monitor finds what is wrong."""
    WATCHED[function.__name__] = function
    return function


def in_thread(work: Callable[[], object]) -> None:
    """Do the work in a thread of its own, from its start to its end."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


class _Asked(nn.Module):
    """Hands its input to another thread, which asks for its gradient in the midst of forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        leaf = [p for p in _leaves(x) if p.requires_grad]
        in_thread(lambda: torch.autograd.grad(x.sum(), leaf, retain_graph=True, allow_unused=True))
        return x


def _leaves(x: torch.Tensor) -> list[torch.Tensor]:
    found, todo = [], [x.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            if hasattr(node, "variable"):
                found.append(node.variable)
            todo += [following for following, _ in node.next_functions]
    return found


@watched_scenario
def a_backward_in_another_thread_during_forward(engine: ModuleType) -> None:
    model, x = chain(4)
    model = nn.Sequential(*list(model)[:4], _Asked(), *list(model)[4:])
    for _ in range(2):
        device = engine.VirtualDevice()
        engine.wrap_model(model, device, by_rule(engine, max_inflight_bytes=1 << 10, ahead_bytes=1 << 11))
        loss = model(x).sum()
        in_thread(lambda loss=loss: loss.backward(retain_graph=True))
        loss.backward()
        engine.unwrap_model(model)
        device.finish()


@watched_scenario
def a_planned_release_after_a_backward_in_another_thread(engine: ModuleType) -> None:
    names = [SavedName("1", 0, 0, "float32", 2, 512), SavedName("2", 0, 0, "float32", 2, 512)]
    for point in ("end 5#0", "pack 6#0/0"):
        plan = Plan("by hand", "chain", 8, "cpu", "", None, (Entry(tuple(names), 512, Offload(point)),), "keep", 1)
        model, x = chain(4)
        model = nn.Sequential(*list(model)[:4], _Asked(), *list(model)[4:])
        engine.wrap_model(model, engine.VirtualDevice(), lambda *_, plan=plan: engine.Schedule(plan))
        loss = model(x).sum()
        in_thread(lambda loss=loss: loss.backward(retain_graph=True))
        loss.backward()
        engine.unwrap_model(model)


class _AskedOnTheWay(nn.Module):
    """An ELU whose output is saved, asked for in another thread, and saved again, before the module is over."""

    kept: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.elu(x)
        if y.requires_grad:
            spare = self.kept = (y * y).sum()
            in_thread(lambda: torch.autograd.grad(spare, _leaves(spare), retain_graph=True, allow_unused=True))
            y.mul(y)
        return y


@watched_scenario
def a_storage_that_comes_again_is_asked_for_in_another_thread(engine: ModuleType) -> None:
    source, *names = (SavedName("1", 0, n, "float32", 2, 512) for n in range(5))
    entry = Entry((*names, SavedName("2", 0, 0, "float32", 2, 512)), 512, Recompute("", ("1#0",), str(source)))
    plan = Plan("by hand", "an ELU", 8, "cpu", "", None, (entry,), "keep", 1)
    model = nn.Sequential(nn.Linear(16, 16), _AskedOnTheWay(), nn.Linear(16, 16))
    engine.wrap_model(model, engine.VirtualDevice(), lambda *_: engine.Schedule(plan))
    loss = model(torch.randn(8, 16)).sum()
    in_thread(lambda: loss.backward(retain_graph=True))
    loss.backward()
    engine.unwrap_model(model)


class _FilledOnTheWay(nn.Module):
    """Saves a mask, which another thread then asks for, and then another mask."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = x > 0
        y = x.masked_fill(mask, 0)
        in_thread(lambda: torch.autograd.grad(y.sum(), _leaves(y), retain_graph=True, allow_unused=True))
        return y + x.masked_fill(x < 0, 1)


@watched_scenario
def a_code_is_asked_for_in_another_thread(engine: ModuleType) -> None:
    names = [SavedName("1", 0, n, "bool", 2, 128) for n in range(2)]
    actions = [Encode("bits", "", "end 1#0", back) for back in ("", "unpack 1#0/0")]
    entries = tuple(Entry((name,), 128, action) for name, action in zip(names, actions, strict=True))
    plan = Plan("by hand", "masks", 8, "cpu", "", None, entries)
    model = nn.Sequential(nn.Linear(16, 16), _FilledOnTheWay())
    engine.wrap_model(model, engine.VirtualDevice(), lambda *_: engine.Schedule(plan))
    loss = model(torch.randn(8, 16)).sum()
    in_thread(lambda: loss.backward(retain_graph=True))
    loss.backward()
    engine.unwrap_model(model)


@watched_scenario
def two_models_in_two_threads_on_one_device(engine: ModuleType) -> None:
    device = engine.VirtualDevice(seed=4)

    def run(rows: int) -> None:
        model, x = chain(rows=rows)  # each thread takes host blocks of a new size
        engine.wrap_model(model, device, by_rule(engine, max_inflight_bytes=1 << 9, ahead_bytes=1 << 10))
        for _ in range(2):
            model(x).sum().backward()
            model(x)  # a graph that is dropped
            device.host_bytes()
        engine.unwrap_model(model)
        device.finish()

    for rows in (64, 128, 192):
        in_thread(lambda rows=rows: run(rows))


@watched_scenario
def a_graph_that_dies_in_another_thread(engine: ModuleType) -> None:
    device = engine.VirtualDevice()
    model, x = chain()
    engine.wrap_model(model, device, by_rule(engine, max_inflight_bytes=1 << 9))
    for _ in range(3):
        graphs = [model(x).sum()]
        in_thread(graphs.clear)
        device.host_bytes()
    engine.unwrap_model(model)
    device.finish()


def races_in(engine: ModuleType, monitor: Monitor) -> list[str]:
    """Run the watched scenarios until the monitor finds something."""
    for run in WATCHED.values():
        run(engine)
        if monitor.races:
            break
    return monitor.races
