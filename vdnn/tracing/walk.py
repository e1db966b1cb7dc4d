"""Backward without the autograd engine: the graph's nodes called from Python, in the engine's order."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["walk"]


def walk(loss: torch.Tensor, on_node: Callable[[Any], None], on_grad: Callable[[torch.Tensor], None]) -> None:
    """Run backward of `loss`: highest sequence number first among the nodes all of whose users are done."""
    root: Any = loss.grad_fn
    waiting: dict[Any, int] = {root: 0}
    stack = [root]
    while stack:
        node = stack.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            if following not in waiting:
                waiting[following] = 0
                stack.append(following)
            waiting[following] += 1
    first = torch.ones_like(loss)  # `Tensor.backward` holds it until it returns
    on_grad(first)
    grads: dict[Any, dict[int, torch.Tensor]] = {root: {0: first}}
    order = 0
    ready: list[tuple[int, int, Any]] = [(-_sequence(root), 0, root)]
    while ready:
        _, _, node = heapq.heappop(ready)
        given = grads.pop(node, {})
        on_node(node)
        if type(node).__name__ == "AccumulateGrad":
            _accumulate(node, given.pop(0, None), grads)
            continue
        results = _call(node, given) if given else ()
        given.clear()
        for slot, (following, place) in enumerate(node.next_functions):
            if following is None:
                continue
            grad = results[slot] if slot < len(results) else None
            if grad is not None:
                grad = _fitted(grad, following, place)
                on_grad(grad)
                held = grads.setdefault(following, {})
                held[place] = held[place] + grad if place in held else grad
            waiting[following] -= 1
            if waiting[following] == 0:
                order += 1
                heapq.heappush(ready, (-_sequence(following), order, following))
            grad = None
        results = ()


def _sequence(node: Any) -> int:
    return int(node._sequence_nr())


def _accumulate(node: Any, grad: torch.Tensor | None, grads: dict[Any, dict[int, torch.Tensor]]) -> None:
    """What the AccumulateGrad node does: keep a gradient that nobody else holds, copy one that somebody does.

    Called from Python the node would always copy, since Python holds the gradient too.
    """
    if grad is None:
        return
    variable = node.variable
    shared = any(other is grad for pending in grads.values() for other in pending.values())
    dense = torch._prims_common.is_non_overlapping_and_dense_or_false(variable)
    fits = grad.stride() == variable.stride() if dense else grad.is_contiguous()
    if variable.grad is None and fits and not shared:
        variable.grad = grad.detach()
    else:
        node(grad)
    for hook in (getattr(variable, "_post_accumulate_grad_hooks", None) or {}).values():
        hook(variable)


def _call(node: Any, given: dict[int, torch.Tensor]) -> tuple[Any, ...]:
    meta = node._input_metadata
    python = not callable(node)
    arguments = [given.get(i) for i in range(max(len(meta), 1))]
    if python:
        arguments = [
            torch.zeros(m.shape, dtype=m.dtype, device=m.device) if a is None else a
            for a, m in zip(arguments, meta, strict=True)
        ]
    given.clear()
    results = node.apply(*arguments) if python else node(*arguments)
    return results if isinstance(results, tuple) else (results,)


def _fitted(grad: torch.Tensor, node: Any, place: int) -> torch.Tensor:
    meta = node._input_metadata
    if place >= len(meta):
        return grad
    shape, dtype = meta[place].shape, meta[place].dtype
    if grad.shape != shape:
        grad = grad.sum_to_size(shape)
    return grad if grad.dtype == dtype else grad.to(dtype)
