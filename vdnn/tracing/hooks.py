"""Hooks on tensors and on autograd nodes, noted as they are registered: a walk over the nodes must run them itself.

The engine would run them, but a node that is called from Python does not, and does not show them either.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

__all__ = ["NotedHooks", "creator"]

_GRAD_FN: Any = torch.Tensor.grad_fn.__get__  # type: ignore[union-attr]


def creator(tensor: torch.Tensor) -> Any:
    """The node that made the tensor, itself and not the stand-in that user code gets."""
    with torch._C.DisableTorchFunction():
        return tensor.grad_fn


class NotedHooks(TorchFunctionMode):
    """While it is active, notes each hook with its node. `before` and `after` are those of nodes."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: dict[Any, list[tuple[int, Any]]] = {}
        self._retained: dict[Any, list[tuple[int, weakref.ref[torch.Tensor]]]] = {}
        self._before: dict[Any, OrderedDict[int, Callable[..., Any]]] = {}
        self._after: dict[Any, OrderedDict[int, Callable[..., Any]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.register_hook or func is torch.Tensor.retain_grad:
            tensor = args[0]
            node = creator(tensor)
            if node is not None:
                if func is torch.Tensor.register_hook:
                    hooks = tensor._backward_hooks
                    known = self._tensors.setdefault(node, [])
                    if not any(other is hooks for _, other in known):
                        known.append((tensor.output_nr, hooks))
                else:
                    self._retained.setdefault(node, []).append((tensor.output_nr, weakref.ref(tensor)))
        elif out is not None and func == _GRAD_FN and not isinstance(out, BackwardCFunction):
            return _Node(out, self)
        return out

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """The mode, and the same for nodes of custom functions, whose class can be asked."""

        def no_zeros(ctx: Any, value: bool) -> None:
            ctx.vdnn_zeros = value
            given(ctx, value)

        given = FunctionCtx.set_materialize_grads
        with (
            self,
            mock.patch.object(BackwardCFunction, "register_hook", lambda node, hook: self.add_after(node, hook)),
            mock.patch.object(BackwardCFunction, "register_prehook", lambda node, hook: self.add_before(node, hook)),
            mock.patch.object(FunctionCtx, "set_materialize_grads", no_zeros),
        ):
            try:
                yield
            finally:
                for noted in (self._tensors, self._retained, self._before, self._after):
                    noted.clear()  # they hold the graph

    def add_before(self, node: Any, hook: Callable[..., Any]) -> RemovableHandle:
        return _added(self._before, node, hook)

    def add_after(self, node: Any, hook: Callable[..., Any]) -> RemovableHandle:
        return _added(self._after, node, hook)

    def on_tensors(self, node: Any, grads: dict[int, torch.Tensor]) -> None:
        """Run the hooks of the tensors that the node made; they may put other gradients in the place of theirs."""
        for slot, hooks in self._tensors.get(node, ()):
            for hook in tuple((hooks or {}).values()):
                if slot in grads:
                    other = hook(grads[slot])
                    if other is not None:
                        grads[slot] = other
        for slot, reference in self._retained.get(node, ()):
            tensor = reference()
            if tensor is not None and slot in grads:
                tensor.grad = grads[slot]

    def before_node(self, node: Any, grads: list[Any]) -> list[Any]:
        for hook in tuple(self._before.get(node, {}).values()):
            other = hook(tuple(grads))
            if other is not None:
                grads = list(other) if isinstance(other, tuple | list) else [other]
        return grads

    def watched_after(self, node: Any) -> bool:
        return bool(self._after.get(node))

    def after_node(self, node: Any, results: tuple[Any, ...], grads: tuple[Any, ...]) -> tuple[Any, ...]:
        for hook in tuple(self._after.get(node, {}).values()):
            other = hook(results, grads)
            if other is not None:
                results = tuple(other) if isinstance(other, tuple | list) else (other,)
        return results


def _added(noted: dict[Any, Any], node: Any, hook: Callable[..., Any]) -> RemovableHandle:
    hooks = noted.setdefault(node, OrderedDict())
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


class _Node:
    """Stands for a node of torch's own, whose class cannot be asked: what is registered on it is noted."""

    def __init__(self, node: Any, hooks: NotedHooks) -> None:
        self._node = node
        self._hooks = hooks

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._node)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def __call__(self, *grads: Any) -> Any:
        return self._node(*grads)

    def __eq__(self, other: object) -> bool:
        return self._node is (other._node if type(other) is _Node else other)

    def __hash__(self) -> int:
        return hash(self._node)

    def register_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        return self._hooks.add_after(self._node, hook)

    def register_prehook(self, hook: Callable[..., Any]) -> RemovableHandle:
        return self._hooks.add_before(self._node, hook)
