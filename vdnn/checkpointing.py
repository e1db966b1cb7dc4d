"""Checkpointing of a model's repeated blocks: keep their inputs, recompute the rest in backward.

    undo = checkpoint_blocks(model)            the blocks are found; or named: ["layers.*"]
    …train…
    undo()

It is `torch.utils.checkpoint` (non-reentrant) around each block's forward, with three things put right. Buffers that
forward updates, such as the statistics of a batch norm, are updated once, not again by the recomputation. A block is
recomputed with the mode, weights and attributes of its forward, and what was frozen then is. And a block that changes
its input in place is an error at once: gradients recomputed from it would be wrong. (An input that is changed later is
autograd's own error, in backward.)
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from vdnn.engine.before import Before, trained_as, untransformed
from vdnn.errors import EngineError, UsageError

__all__ = ["blocks_of", "checkpoint_blocks"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks_of(model: nn.Module) -> list[str]:
    """Names of the repeated blocks: siblings of one class that have modules of their own, the outermost first.

    Containers are no blocks, but what they hold may be. A model without repetition has none.
    """
    found: list[str] = []

    def look(module: nn.Module, fqn: str) -> None:
        children = [(name, child) for name, child in module.named_children() if child is not None]
        kinds = [type(child) for _, child in children]
        for name, child in children:
            path = f"{fqn}.{name}" if fqn else name
            inner = any(True for _ in child.children())
            if inner and not isinstance(child, _CONTAINERS) and kinds.count(type(child)) > 1:
                found.append(path)
            elif inner:
                look(child, path)

    look(model, "")
    return found


def checkpoint_blocks(model: nn.Module, patterns: Sequence[str] = ()) -> Callable[[], None]:
    """Checkpoint the model's blocks (those whose names match a pattern, if any is given); returns what undoes it.

    Raises:
        UsageError: no repeated blocks, or a pattern that no module's name matches.
        EngineError: a block is checkpointed already.
    """
    names = [fqn for fqn, _ in model.named_modules() if fqn]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UsageError(f"no module of {type(model).__name__} is named like {pattern!r}, such as {names[:4]}")
    chosen = [fqn for fqn in names if any(fnmatch.fnmatch(fqn, p) for p in patterns)] if patterns else blocks_of(model)
    # a block inside a block would be recomputed twice
    outermost = [fqn for fqn in chosen if not any(fqn.startswith(f"{other}.") for other in chosen)]
    if not outermost:
        raise UsageError(
            f"{type(model).__name__} has no repeated blocks to checkpoint: name the modules to recompute, "
            f"such as {names[:4]}"
        )
    blocks = [model.get_submodule(fqn) for fqn in outermost]
    for fqn, block in zip(outermost, blocks, strict=True):
        if isinstance(block.__dict__.get("forward"), _Recomputed):
            raise EngineError(f"{fqn} is checkpointed already: undo that first")
    for block in blocks:
        block.forward = _Recomputed(block, block.__dict__.get("forward"))

    def undo() -> None:
        for block in blocks:
            ours = block.__dict__.pop("forward", None)
            if isinstance(ours, _Recomputed) and ours.before is not None:
                block.forward = ours.before

    return undo


class _Recomputed:
    """A block's forward under checkpoint. `before` is an instance's own forward, of another library."""

    def __init__(self, block: nn.Module, before: Callable[..., Any] | None) -> None:
        self.block = block
        self.before = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.before or type(self.block).forward.__get__(self.block)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        modules = [self.block, *(leaf for leaf in leaves if isinstance(leaf, nn.Module))]
        before = [leaf._version for leaf in inputs if not leaf.is_inference()]
        output = checkpoint(
            forward, *args, use_reentrant=False, context_fn=functools.partial(_contexts, modules), **kwargs
        )
        if before != [leaf._version for leaf in inputs if not leaf.is_inference()]:
            raise EngineError(
                f"a {type(self.block).__name__} changes its input in place, so it cannot be recomputed from it: keep "
                "that block (name the others with blocks=…), or let it work on a copy"
            )
        return output


def _contexts(modules: Sequence[nn.Module]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the forward of a block, and for each time that it is recomputed."""
    return contextlib.nullcontext(), _AsBefore(modules)


class _AsBefore(AbstractContextManager[None]):
    """A block and the modules that it is given, as they were in forward: mode, weights, attributes, what is trained.

    It counts nothing. It is entered once for each backward: a graph that is retained is recomputed for every one.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._before = [Before(module) for module in modules]
        parts = [part for module in modules for part in module.modules()]
        self._parts = [(part, part.training, dict(part._parameters)) for part in parts]
        self._trained = [(p, p.requires_grad) for module in modules for p in module.parameters()]
        self._open: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        again = self._again()
        again.__enter__()
        self._open.append(again)

    def __exit__(self, *error: Any) -> None:
        self._open.pop().__exit__(*error)

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        now = [(part, part.training, part._parameters) for part, _, _ in self._parts]
        found = (buffer for part, _, _ in now for buffer in part.buffers(recurse=False))
        buffers = list(dict.fromkeys(buffer for buffer in found if not buffer.is_inference()))
        copies = [buffer.detach().clone() for buffer in buffers]
        with contextlib.ExitStack() as stack:
            for before in self._before:
                stack.enter_context(before.attributes())
            try:
                for part, training, parameters in self._parts:
                    part.training = training
                    if any(part._parameters.get(name) is not p for name, p in parameters.items()):
                        part.__dict__["_parameters"] = dict(parameters)  # of `functional_call`
                with trained_as(self._trained), untransformed():
                    yield
            finally:
                for part, training, others in now:
                    part.training = training
                    part.__dict__["_parameters"] = others
                with torch.no_grad():
                    for buffer, value in zip(buffers, copies, strict=True):
                        buffer.copy_(value)
