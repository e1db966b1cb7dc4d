"""Putting the engine on a model and taking it off again, and running it on a block of code.

    wrap_model(model, device, schedule_for)   hooks on the model's modules; the model stays itself
    unwrap_model(model)                       takes them off
    with offloading(device, rule): …          for a loop, a function, part of a model

`schedule_for(model, args, kwargs)` is asked at the start of each pass; whoever wraps decides there, by
plan or by rule.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vdnn.calls import Frame, Hook, ModuleCalls
from vdnn.engine.account import EngineReport
from vdnn.engine.device import Device, is_plain
from vdnn.engine.offloader import Offloader
from vdnn.engine.schedule import Rule, Schedule
from vdnn.engine.untouched import storage_keys
from vdnn.errors import EngineError

__all__ = ["Engine", "Offloading", "engine_of", "leave_model", "offloading", "report_of", "unwrap_model", "wrap_model"]

ScheduleFor = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Schedule]

_ENGINES: weakref.WeakKeyDictionary[nn.Module, Engine] = weakref.WeakKeyDictionary()

# Models that were wrapped where nothing can be offloaded: without an engine, reported and unwrapped all the same.
_IDLE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Calls(ModuleCalls):
    """Module calls that are followed only while something can move."""

    def __init__(self, root: nn.Module, on_begin: Callable[[Frame], None], on_end: Callable[[Frame], None]) -> None:
        super().__init__(root, on_begin, on_end)
        self.attached = False

    def attach(self) -> None:
        self.attached = True
        super().attach()

    def detach(self) -> None:
        self.attached = False
        super().detach()

    def in_root(self) -> bool:
        """Whether the call of the root that begins now is made inside another call of it."""
        return self.current is not None and self._runs_inside_itself()

    def join(self) -> None:
        """Follow the root's call from inside one of its own hooks, where it is too late for new ones to run."""
        self.attach()
        self._begin(self.root, (), {})


class Engine:
    """The engine on one model: follows its module calls and opens the hooks while its forward runs.

    At the start of each pass it decides; a pass in which nothing can move runs as if the model were not wrapped.
    """

    def __init__(self, model: nn.Module, device: Device, schedule_for: ScheduleFor) -> None:
        self.offloader = Offloader(device)
        self.last: Schedule | None = None
        # torch.compile around the model runs its hooks; what is decided there may capture, which must not be compiled
        self._schedule_for = torch.compiler.disable(schedule_for)
        self._deciding = False
        self._next: Schedule | None = None
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self._thread: threading.Thread | None = None
        self._calls = _Calls(model, self._on_begin, self._on_end)
        self._hook = Hook(self._before)
        self._first = self._watch(model)

    def _watch(self, model: nn.Module) -> RemovableHandle:
        """Decide in front of every other hook on the model: what follows its calls must know by then."""
        return model.register_forward_pre_hook(self._hook, with_kwargs=True, prepend=True)

    def remove(self) -> None:
        """Take every hook off the model."""
        self._close()
        self._first.remove()
        self._hook.rest()
        self._calls.detach()
        self.offloader.close()

    def report(self) -> EngineReport:
        """What the engine did so far."""
        counts, plan = self.offloader.counts, self.last.plan if self.last else None
        host = self.offloader.device.host_bytes()
        return EngineReport(
            device=self.offloader.device.name,
            policy=plan.policy if plan else "by rule" if self.last else "not decided",
            passes=counts.passes,
            packs=counts.packs,
            offloaded_storages=counts.offloaded_storages,
            offloaded_bytes=counts.offloaded_bytes,
            prefetched_storages=counts.prefetched_storages,
            fetched_storages=counts.fetched_storages,
            returned_bytes=counts.returned_bytes,
            encoded_storages=counts.encoded_storages,
            encoded_bytes=counts.encoded_bytes,
            code_bytes=counts.code_bytes,
            dropped_storages=counts.dropped_storages,
            dropped_bytes=counts.dropped_bytes,
            host_full=counts.host_full,
            host_used_bytes=host.used_bytes,
            host_peak_bytes=host.peak_bytes,
            host_reserved_bytes=host.reserved_bytes,
            host_pinned_bytes=host.pinned_bytes,
            host_allocations=host.allocations,
            mismatches=tuple(counts.mismatches),
            notes=plan.notes if plan else (),
        )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._deciding:
            return  # deciding may run the model (a capture); that is no pass
        if self._thread is not None and self._thread is not threading.current_thread() and self._thread.is_alive():
            raise EngineError(
                f"the wrapped {type(module).__name__} was called in thread {threading.current_thread().name!r} while "
                f"thread {self._thread.name!r} is in its forward: give each thread a model of its own, or a lock"
            )
        if self._calls.in_root():
            return
        self._close()  # a forward that was broken off by more than an Exception leaves its hooks open
        self._calls.current = None
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return
        if torch._C._functorch.maybe_current_level() is not None:
            raise EngineError(
                f"the wrapped {type(module).__name__} was called inside a transform of torch.func (grad, vmap, …), "
                "which takes no saved-tensor hooks: unwrap the model there (vdnn.unwrap), or use torch.autograd.grad"
            )
        self._deciding = True
        try:
            schedule = self._schedule_for(module, args, kwargs)
        finally:
            self._deciding = False
        self.last = schedule
        if schedule.idle:
            self.offloader.counts.passes += 1
            if self._calls.attached:
                self._calls.detach()
            return
        self._next = schedule
        if not self._calls.attached:
            self._calls.join()
            self._first.remove()
            self._first = self._watch(module)

    def _on_begin(self, frame: Frame) -> None:
        if frame.parent is None:
            schedule, self._next = self._next, None
            if schedule is None:
                return
            self._open(schedule, frame.module)
        self.offloader.enter(frame)

    def _on_end(self, frame: Frame) -> None:
        try:
            self.offloader.leave(frame)
        finally:
            if frame.parent is None:
                self._close()

    def _open(self, schedule: Schedule, model: nn.Module) -> None:
        self.offloader.begin(schedule, storage_keys(model))
        self._thread = threading.current_thread()
        hooks = torch.autograd.graph.saved_tensors_hooks(self.offloader.pack, self.offloader.unpack)
        hooks.__enter__()
        self._hooks = hooks

    def _close(self) -> None:
        hooks, self._hooks = self._hooks, None
        thread, self._thread = self._thread, None
        self.offloader.end()
        if hooks is not None and thread is threading.current_thread():
            hooks.__exit__()  # those of a thread that has ended are gone with it


def _guard_hooks() -> None:
    """Have torch.compile look at modules' hooks when it chooses compiled code.

    It shares that code among modules of one class, and would run a wrapped model with what it compiled for one
    without hooks: right numbers, and nothing offloaded.
    """
    import torch._dynamo.config

    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset_code_caches()  # what was compiled before now does not look


@functools.cache
def _never_compile_hooks() -> None:
    """Have torch.compile leave the engine alone: torch 2.11 compiled its hooks, for tensors that have no bytes."""
    from torch._dynamo import trace_rules

    trace_rules.add("vdnn.engine")


def wrap_model(model: nn.Module, device: Device, schedule_for: ScheduleFor) -> Engine:
    """Put the engine on the model, in place.

    Raises:
        EngineError: it is on this model, or on a part of it, already.
    """
    _guard_hooks()
    _never_compile_hooks()
    for fqn, module in model.named_modules():
        if module in _ENGINES:
            raise EngineError(
                f"{'the model' if not fqn else f'its part {fqn!r}'} is wrapped already: unwrap it first (vdnn.unwrap)"
            )
    engine = Engine(model, device, schedule_for)
    _ENGINES[model] = engine
    _IDLE.discard(model)
    return engine


def leave_model(model: nn.Module) -> None:
    """Leave a model as it is, where nothing can be offloaded, so that its report says so."""
    _IDLE.add(model)


def unwrap_model(model: nn.Module) -> None:
    """Take the engine off the model.

    Raises:
        EngineError: it is not wrapped.
    """
    if model in _IDLE:
        _IDLE.discard(model)
        return
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


def report_of(model: nn.Module) -> EngineReport:
    """What the engine did to a model so far, or why there is none on it.

    Raises:
        EngineError: it is not wrapped.
    """
    if model in _IDLE:
        why = (
            "the model was on the CPU when it was wrapped: offload is inactive, move it to its device and wrap it again"
        )
        return EngineReport("cpu", "none", notes=(why,))
    return engine_of(model).report()


def offloading(device: Device, rule: Rule, model: nn.Module | None = None) -> Offloading:
    """Offload by rule whatever autograd saves inside the block. Backward may run inside or after it.

    Modules that run inside are followed, so that their parameters and buffers stay.
    """
    return Offloading(device, rule, model)


class Offloading(AbstractContextManager[Offloader]):
    """The engine on a block of code; may be used again once the block is over.

    Raises:
        EngineError: the same object is entered a second time inside its own block.
    """

    def __init__(self, device: Device, rule: Rule, model: nn.Module | None = None) -> None:
        self.offloader = Offloader(device)
        self._schedule = Schedule(None, rule)
        self._model = model
        self._stack: contextlib.ExitStack | None = None

    def __enter__(self) -> Offloader:
        if self._stack is not None:
            raise EngineError("this offload block is open already: make another one, or close it first")
        offloader = self.offloader
        with contextlib.ExitStack() as stack:
            if not self._schedule.idle:
                offloader.begin(self._schedule, storage_keys(self._model) if self._model is not None else set())
                stack.callback(offloader.end)
                stack.callback(nn.modules.module.register_module_forward_pre_hook(self._before).remove)
                hooks = torch.autograd.graph.saved_tensors_hooks(offloader.pack, offloader.unpack)
                stack.enter_context(cast(AbstractContextManager[None], hooks))
            self._stack = stack.pop_all()
        return offloader

    def __exit__(self, *error: object) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def _before(self, module: nn.Module, args: Any) -> None:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and is_plain(tensor) and not tensor.is_meta:
                self.offloader.fixed.add(tensor.untyped_storage()._cdata)
