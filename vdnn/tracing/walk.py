"""Backward without the autograd engine: the graph's nodes called from Python, in the engine's order.

The engine asks for the device of what it runs; a node that is called does not. Highest sequence number first
among the nodes all of whose users are done. `Backward.engine` takes the engine's place for library code that
calls backward itself: reentrant checkpointing in backward, gradient penalties in forward.
"""

from __future__ import annotations

import contextlib
import heapq
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from vdnn.tracing.hooks import NotedHooks

__all__ = ["Backward"]

Grads = dict[int, torch.Tensor]


class _Kept:
    """A tensor saved while backward runs; emptied when its node is done, as the engine does."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor


class Backward:
    """Runs backward. `on_node` hears of each node before it runs, `on_done` after, `on_grad` of each gradient."""

    def __init__(
        self,
        hooks: NotedHooks,
        on_node: Callable[[Any], None],
        on_done: Callable[[Any], None],
        on_grad: Callable[[torch.Tensor], None],
        unseen: Callable[[], contextlib.AbstractContextManager[None]],
        in_place: bool = True,
    ) -> None:
        """`in_place`: gradients are added as the engine does it, and not as it does under a dispatch mode (a virtual
        device's account is one): it then adds nothing in place.
        """
        self._in_place = in_place
        self._hooks = hooks
        self._on_node = on_node
        self._on_done = on_done
        self._on_grad = on_grad
        self._unseen = unseen
        self._opened: list[_Kept] = []
        self._alone: tuple[int, ...] = ()  # what `_holders` says of a tensor that nobody else holds
        self.given: set[torch.Tensor] = set()  # leaves that got a gradient

    def of(self, loss: torch.Tensor) -> None:
        """Backward of the step's loss."""
        first = torch.ones_like(loss)  # `Tensor.backward` holds it until it returns
        self._on_grad(first)
        # what a node computes with gradients on (a checkpoint's forward) is saved in this graph only
        with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(self._keep, self._give):
            self._run([_edge(loss)], [first], retain=False)

    @contextlib.contextmanager
    def instead_of_the_engine(self) -> Iterator[None]:
        with (
            mock.patch.object(torch.autograd, "_engine_run_backward", self.engine),
            mock.patch.object(torch.autograd.graph, "_engine_run_backward", self.engine),
        ):
            yield

    def engine(
        self,
        outputs: Sequence[Any],
        grads: Sequence[torch.Tensor | None],
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Sequence[Any] = (),
        allow_unreachable: bool = False,
        accumulate_grad: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        """As torch's `_engine_run_backward`."""
        edges = [_edge(output) for output in outputs]
        given = [torch.ones_like(output) if grad is None else grad for output, grad in zip(outputs, grads, strict=True)]
        wanted = [_edge(x) for x in inputs]
        with torch.set_grad_enabled(create_graph):
            found = self._run(edges, given, bool(retain_graph or create_graph), wanted)
        if not accumulate_grad:
            if not allow_unreachable and any(edge not in found for edge in wanted):
                raise RuntimeError("One of the differentiated Tensors appears to not have been used in the graph")
            return tuple(found.get(edge) for edge in wanted)
        for x, edge in zip(inputs, wanted, strict=True):
            if edge in found:
                x.grad = found[edge] if x.grad is None else x.grad + found[edge]
        return ()

    # -- the walk ----------------------------------------------------------------------------------

    def _run(
        self,
        roots: Sequence[tuple[Any, int]],
        first: Sequence[torch.Tensor],
        retain: bool,
        wanted: Sequence[tuple[Any, int]] = (),
    ) -> dict[tuple[Any, int], torch.Tensor]:
        waiting = _users(roots)
        useful = _on_the_way(waiting, wanted) if wanted else None
        ends = {node for node, _ in wanted}
        found: dict[tuple[Any, int], torch.Tensor] = {}
        grads: dict[Any, Grads] = {}
        for (node, place), grad in zip(roots, first, strict=True):
            self._add(grads.setdefault(node, {}), place, _fitted(grad, node, place))
        order = 0
        ready: list[tuple[int, int, Any]] = []
        for node in dict.fromkeys(node for node, _ in roots):
            if waiting[node] == 0:
                heapq.heappush(ready, (-int(node._sequence_nr()), order, node))
                order += 1
        while ready:
            _, _, node = heapq.heappop(ready)
            given = grads.pop(node, {})
            if useful is not None and node not in useful and node not in ends:
                continue
            self._on_node(node)
            accumulates = type(node).__name__ == "AccumulateGrad"
            if accumulates:
                _leaf_hooks(node, given)
            else:
                self._hooks.on_tensors(node, given)
            for edge in wanted:
                if edge[0] is node and edge[1] in given:
                    found[edge] = given[edge[1]]
            if useful is not None and node not in useful:
                continue
            if accumulates:
                if 0 in given:
                    self.given.add(node.variable)
                    _accumulate(node, given.pop(0), grads, self._in_place)
                self._on_done(node)
                continue
            results = self._call(node, given, retain)
            self._on_done(node)  # the engine releases what the node saved before it passes the gradients on
            for slot, (following, place) in enumerate(node.next_functions):
                if following is None:
                    continue
                if slot < len(results) and results[slot] is not None:
                    self._on_grad(results[slot])
                    grad, results[slot] = results[slot], None
                    self._add(grads.setdefault(following, {}), place, grad)
                    del grad
                waiting[following] -= 1
                if waiting[following] == 0:
                    heapq.heappush(ready, (-int(following._sequence_nr()), order, following))
                    order += 1
        return found

    def _add(self, held: Grads, place: int, grad: torch.Tensor) -> None:
        """The engine's `InputBuffer::accumulate`: into the gradient that is there, if nobody else holds it."""
        if place not in held:
            held[place] = grad
            return
        if not self._alone:
            with self._unseen():
                self._alone = _holders({0: torch.empty(1, device=grad.device)}, 0)
        dense = torch._prims_common.is_non_overlapping_and_dense_or_false(held[place])
        if self._in_place and dense and not torch.is_grad_enabled() and _holders(held, place) == self._alone:
            held[place].add_(grad)
        else:
            held[place] = held[place] + grad

    def _call(self, node: Any, given: Grads, retain: bool) -> list[Any]:
        """The node's gradients, fitted to the nodes that they go to: all of them before the first goes there."""
        python = isinstance(node, BackwardCFunction) or not callable(node)
        zeros = python and getattr(node, "vdnn_zeros", True)
        if not given and not zeros:
            return []
        meta = node._input_metadata
        grads: list[Any] = [given.get(i) for i in range(max(len(meta), 1))]
        given.clear()
        if zeros:
            grads = [
                torch.zeros(m.shape, dtype=m.dtype, device=m.device) if grad is None else grad
                for grad, m in zip(grads, meta, strict=True)
            ]
        grads = self._hooks.before_node(node, grads)
        watched = tuple(grads) if self._hooks.watched_after(node) else ()
        outer, self._opened = self._opened, []
        try:
            results = node.apply(*grads) if python else node(*grads)
        finally:
            opened, self._opened = self._opened, outer
        if not retain:
            for kept in opened:
                kept.tensor = None
        del grads
        fitted = list(results) if isinstance(results, tuple) else [results]
        if python:
            fitted = _per_edge(node, fitted)
        results = None
        for slot, (following, place) in enumerate(node.next_functions):
            if following is not None and slot < len(fitted) and fitted[slot] is not None:
                fitted[slot] = _fitted(fitted[slot], following, place)
        return list(self._hooks.after_node(node, tuple(fitted), watched)) if watched else fitted

    def _keep(self, tensor: torch.Tensor) -> _Kept:
        with self._unseen():
            return _Kept(tensor.detach())

    def _give(self, kept: _Kept) -> torch.Tensor:
        if kept.tensor is None:
            raise RuntimeError("backward ran a second time through a part of the graph that was freed")
        self._opened.append(kept)
        return kept.tensor


def _per_edge(node: Any, grads: list[Any]) -> list[Any]:
    """A custom function gives a gradient for every argument; its node has edges for those that are tensors.

    Raises:
        RuntimeError: the function gave fewer gradients than it has arguments that need one.
    """
    needed = node.needs_input_grad
    if len(grads) < len(needed) and any(needed[len(grads) :]):
        raise RuntimeError(f"{node.name()} returned {len(grads)} gradients for {len(needed)} arguments")
    wanted = iter([grad for grad, need in zip(grads, needed, strict=False) if need])
    return [next(wanted, None) if following is not None else None for following, _ in node.next_functions]


def _edge(tensor: Any) -> tuple[Any, int]:
    if isinstance(tensor, GradientEdge):
        return getattr(tensor.node, "_node", tensor.node), tensor.output_nr
    with torch._C.DisableTorchFunction():
        edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _users(roots: Sequence[tuple[Any, int]]) -> dict[Any, int]:
    """How many edges lead to each node that can be reached."""
    users = {node: 0 for node, _ in roots}
    stack = list(users)
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is None:
                continue
            if following not in users:
                users[following] = 0
                stack.append(following)
            users[following] += 1
    return users


def _on_the_way(users: dict[Any, int], wanted: Sequence[tuple[Any, int]]) -> set[Any]:
    """Nodes that must run so that the gradients at these edges are known."""
    before: dict[Any, list[Any]] = {}
    for node in users:
        for following, _ in node.next_functions:
            if following is not None:
                before.setdefault(following, []).append(node)
    useful: set[Any] = set()
    stack = [node for node, _ in wanted]
    while stack:
        for node in before.get(stack.pop(), ()):
            if node not in useful:
                useful.add(node)
                stack.append(node)
    return useful


def _holders(held: Grads, place: int) -> tuple[int, ...]:
    """How many hold the tensor in Python, in C++, and its storage."""
    tensor: Any = held[place]
    storages = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return sys.getrefcount(tensor), tensor._use_count(), storages


def _leaf_hooks(node: Any, given: Grads) -> None:
    for hook in tuple((node.variable._backward_hooks or {}).values()):
        if 0 in given:
            other = hook(given[0])
            if other is not None:
                given[0] = other


def _accumulate(node: Any, grad: torch.Tensor, grads: dict[Any, Grads], in_place: bool) -> None:
    """What the AccumulateGrad node does: keep a gradient that nobody else holds, copy one that somebody does, add one
    to what is there.

    Called from Python the node would always copy, since Python holds the gradient too, and never add in place to a
    fake tensor.
    """
    variable = node.variable
    if in_place and variable.grad is not None and not torch.is_grad_enabled():
        variable.grad.add_(grad)
        _accumulated(variable)
        return
    shared = any(other is grad for pending in grads.values() for other in pending.values())
    if variable.grad is None and not shared and not torch.is_grad_enabled() and _obeys_layout(grad, variable):
        variable.grad = grad.detach()
        _accumulated(variable)
    else:
        node(grad)  # runs those hooks, too


def _accumulated(variable: torch.Tensor) -> None:
    for hook in tuple((getattr(variable, "_post_accumulate_grad_hooks", None) or {}).values()):
        hook(variable)


def _obeys_layout(grad: torch.Tensor, variable: torch.Tensor) -> bool:
    """torch/csrc/autograd/utils/grad_layout_contract.h: strides of dimensions of size 1 do not matter, unless 0."""
    if not torch._prims_common.is_non_overlapping_and_dense_or_false(variable):
        return grad.is_contiguous()
    return all(
        ours == theirs if size != 1 else ours != 0
        for size, ours, theirs in zip(grad.shape, grad.stride(), variable.stride(), strict=True)
    )


def _fitted(grad: torch.Tensor, node: Any, place: int) -> torch.Tensor:
    """The engine's `validate_outputs`: summed over what was broadcast, cast to what the forward had."""
    meta = node._input_metadata
    if place >= len(meta):
        return grad
    shape, dtype = tuple(meta[place].shape), meta[place].dtype
    if tuple(grad.shape) != shape:
        if not torch.is_tensor(grad) or grad.dim() < len(shape):
            raise RuntimeError(f"{node.name()} was given a gradient of shape {tuple(grad.shape)} for {shape}")
        grad = grad.sum_to_size(shape)
    return grad if grad.dtype == dtype else grad.to(dtype)
