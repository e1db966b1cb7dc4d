"""What every scenario is made of: a list to be on, an error to raise, and a few models."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["SCENARIOS", "Wrong", "by_rule", "chain", "expect", "must_raise", "no_collector", "same", "scenario", "step"]

Scenario = Callable[[ModuleType], None]

SCENARIOS: dict[str, Scenario] = {}


class Wrong(Exception):
    """The engine did not do what it should; says what was seen."""


def scenario(function: Scenario) -> Scenario:
    """Put a scenario on the list. It takes `vdnn.engine`, or a mutant of it, and raises if something is wrong."""
    SCENARIOS[function.__name__] = function
    return function


def expect(condition: bool, otherwise: str) -> None:
    """Raise `Wrong` unless the condition holds."""
    if not condition:
        raise Wrong(otherwise)


@contextlib.contextmanager
def must_raise(kind: type[BaseException], words: str) -> Iterator[None]:
    """The block must end in this error, with these words."""
    try:
        yield
    except kind as error:
        expect(words in str(error), f"{kind.__name__} without the words {words!r}: {error}")
    else:
        raise Wrong(f"no {kind.__name__} about {words!r}")


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """What dies inside the block dies by its reference count."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def by_rule(engine: ModuleType, **rule: Any) -> Callable[..., Any]:
    """Offload everything; what `Rule` has besides."""
    schedule = engine.Schedule(None, engine.Rule(**({"min_bytes": 1} | rule)))
    return lambda *_: schedule


def chain(layers: int = 3, width: int = 16, rows: int = 8) -> tuple[nn.Module, torch.Tensor]:
    """Linear and Tanh in turn. Every storage that is saved is `4 * width * rows` bytes."""
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*parts), torch.randn(rows, width)


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of one step."""
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(model: nn.Module, x: torch.Tensor, device: Any, schedule_for: Any, engine: ModuleType, steps: int = 2) -> Any:
    """Steps with and without the engine are bit for bit the same, and no host byte stays in use. Returns the counts."""
    expected = step(copy.deepcopy(model), x)
    wrapped = engine.wrap_model(model, device, schedule_for)
    try:
        for _ in range(steps):
            got = step(model, x)
            device.finish()
            expect(len(got) == len(expected), "gradients are missing")
            expect(all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), "wrong gradients")
        expect(device.host_bytes()[0] == 0, "host memory is still in use after the step")
    finally:
        engine.unwrap_model(model)
    return wrapped.offloader.counts


def lives(tensor: torch.Tensor) -> StorageWeakRef:
    """Says later whether the tensor's memory still lives: `.expired()`."""
    return StorageWeakRef(tensor.untyped_storage())
