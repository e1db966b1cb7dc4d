"""Putting the engine on a model and taking it off again, and running it on a block of code.

    wrap_model(model, device, schedule_for)   hooks on the model's modules; the model stays itself
    unwrap_model(model)                       takes them off
    with offloading(device, rule): …          for a loop, a function, part of a model

`schedule_for(model, args, kwargs)` is asked at the start of each pass; whoever wraps decides there, by
plan or by rule.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from vdnn.calls import Frame, Hook, ModuleCalls
from vdnn.engine.account import EngineReport
from vdnn.engine.device import Device
from vdnn.engine.offloader import Offloader, storage_keys
from vdnn.engine.schedule import Rule, Schedule
from vdnn.errors import EngineError

__all__ = ["Engine", "engine_of", "offloading", "unwrap_model", "wrap_model"]

log = logging.getLogger("vdnn")

ScheduleFor = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Schedule]

_ENGINES: weakref.WeakKeyDictionary[nn.Module, Engine] = weakref.WeakKeyDictionary()


class Engine:
    """The engine on one model: follows its module calls and opens the hooks while its forward runs."""

    def __init__(self, model: nn.Module, device: Device, schedule_for: ScheduleFor) -> None:
        self.offloader = Offloader(device)
        self.last: Schedule | None = None
        self._schedule_for = schedule_for
        self._calls = ModuleCalls(model, self._on_begin, self._on_end)
        self._hooks: contextlib.ExitStack | None = None
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._calls.attach()
        # in front of the hook that begins the root's call: the arguments must be known by then
        self._first = model.register_forward_pre_hook(Hook(self._before), with_kwargs=True, prepend=True)

    def remove(self) -> None:
        """Take every hook off the model."""
        self._close()
        self._first.remove()
        self._calls.detach()

    def report(self) -> EngineReport:
        """What the engine did so far."""
        counts, plan = self.offloader.counts, self.last.plan if self.last else None
        used, peak, reserved = self.offloader.device.host_bytes()
        return EngineReport(
            device=self.offloader.device.name,
            policy=plan.policy if plan else "by rule",
            passes=counts.passes,
            packs=counts.packs,
            offloaded_storages=counts.offloaded_storages,
            offloaded_bytes=counts.offloaded_bytes,
            prefetched_storages=counts.prefetched_storages,
            fetched_storages=counts.fetched_storages,
            returned_bytes=counts.returned_bytes,
            host_full=counts.host_full,
            host_used_bytes=used,
            host_peak_bytes=peak,
            host_reserved_bytes=reserved,
            mismatches=tuple(counts.mismatches),
            notes=plan.notes if plan else (),
        )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._calls.current is None:
            self._arguments = (args, kwargs)

    def _on_begin(self, frame: Frame) -> None:
        if frame.parent is None:
            self._close()  # a forward that was broken off by more than an Exception leaves its hooks open
            args, kwargs = self._arguments
            self._arguments = ((), {})
            if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
                return
            # deciding may run the model (a capture), so the root's frame must not be seen by it
            self._calls.current = None
            schedule = self._schedule_for(frame.module, args, kwargs)
            self._calls.current = frame
            self.last = schedule
            self.offloader.begin(schedule, storage_keys(frame.module))
            self._hooks = contextlib.ExitStack()
            self._hooks.enter_context(
                torch.autograd.graph.saved_tensors_hooks(self.offloader.pack, self.offloader.unpack)
            )
        self.offloader.frame = frame
        self.offloader.enter(frame)

    def _on_end(self, frame: Frame) -> None:
        self.offloader.leave(frame)
        self.offloader.frame = frame.parent
        if frame.parent is None:
            self._close()

    def _close(self) -> None:
        hooks, self._hooks = self._hooks, None
        self.offloader.end()
        if hooks is not None:
            hooks.close()


def wrap_model(model: nn.Module, device: Device, schedule_for: ScheduleFor) -> Engine:
    """Put the engine on the model, in place.

    Raises:
        EngineError: it is on this model, or on a part of it, already.
    """
    for fqn, module in model.named_modules():
        if module in _ENGINES:
            raise EngineError(
                f"{'the model' if not fqn else f'its part {fqn!r}'} is wrapped already: unwrap it first (vdnn.unwrap)"
            )
    engine = Engine(model, device, schedule_for)
    _ENGINES[model] = engine
    return engine


def unwrap_model(model: nn.Module) -> None:
    """Take the engine off the model.

    Raises:
        EngineError: it is not wrapped.
    """
    engine = _ENGINES.pop(model, None)
    if engine is None:
        raise EngineError(f"this {type(model).__name__} is not wrapped: there is nothing to undo")
    engine.remove()


def engine_of(model: nn.Module) -> Engine:
    """The engine on a model.

    Raises:
        EngineError: it is not wrapped.
    """
    engine = _ENGINES.get(model)
    if engine is None:
        raise EngineError(f"this {type(model).__name__} is not wrapped: wrap it first (vdnn.wrap)")
    return engine


@contextlib.contextmanager
def offloading(device: Device, rule: Rule, model: nn.Module | None = None) -> Iterator[Offloader]:
    """Offload by rule whatever autograd saves inside the block. Backward may run inside or after it.

    Modules that run inside are followed, so that their parameters and buffers stay.
    """
    offloader = Offloader(device)
    offloader.begin(Schedule(None, rule), storage_keys(model) if model is not None else set())

    def before(module: nn.Module, args: Any) -> None:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.layout is torch.strided and type(tensor.data) is torch.Tensor:
                offloader.fixed.add(tensor.untyped_storage()._cdata)

    with contextlib.ExitStack() as stack:
        stack.callback(offloader.end)
        stack.callback(nn.modules.module.register_module_forward_pre_hook(before).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(offloader.pack, offloader.unpack))
        yield offloader
