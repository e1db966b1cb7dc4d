"""`Before`: what a module's output may depend on beside its input and its weights, as it was when its call began.

    before = Before(module)     when the call begins
    before.changed()            when it is over: a buffer or tensor that it changed, in words; "" if there is none
    with before.attributes():   each module inside has the numbers, texts, tensors and lists of them that it had then

A module that runs again is on copies of its buffers as they are then. Where its own call changes them and its output
depends on them (the vectors of `spectral_norm`, a moving mean that is subtracted), it would give something else.
The statistics of a batch norm in training are written, and not read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

__all__ = ["PLAIN", "Before", "buffers_read", "trained_as", "untransformed", "version_of"]

PLAIN = (int, float, bool, str, type(None))
_SEVERAL = (list, dict, set)  # what is in one of these is put back, too; what those in turn hold is not
_OF_TORCH = frozenset(nn.Module().__dict__) - {"training"}
_Buffers = dict[str, tuple[torch.Tensor, int]]


@contextlib.contextmanager
def untransformed() -> Iterator[None]:
    """Outside of vmap: `autograd.grad(…, is_grads_batched=True)` runs backward in one, and forward was not.

    What is saved is no batch of it, and in one no random numbers can be drawn.
    """
    levels = torch._C._vmapmode_increment_nesting() - 1  # of the one that autograd uses; torch.func has its own
    torch._C._vmapmode_decrement_nesting()
    for _ in range(levels):
        torch._C._vmapmode_decrement_nesting()
    try:
        with temporarily_clear_interpreter_stack():
            yield
    finally:
        for _ in range(levels):
            torch._C._vmapmode_increment_nesting()


def version_of(tensor: torch.Tensor) -> int:
    """How often it was changed in place; 0 of one that was made in inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


def buffers_read(module: nn.Module) -> _Buffers:
    """The module's own buffers that its output may depend on, with their versions."""
    # whoever writes a norm of their own may read what torch's and timm's only write
    author = getattr(type(module).forward, "__module__", "").partition(".")[0]
    if isinstance(module, _NormBase) and module.training and author in ("torch", "timm"):
        return {}
    return {name: (buffer, version_of(buffer)) for name, buffer in module._buffers.items() if buffer is not None}


@contextlib.contextmanager
def trained_as(then: Iterable[tuple[torch.Tensor, bool]]) -> Iterator[None]:
    """Tensors that require gradients as they did then, inside: what autograd saves depends on it.

    A layer may be frozen, or trained, from the middle of a step on, as a GAN's are.
    """
    others = [(tensor, trained) for tensor, trained in then if tensor.requires_grad is not trained]
    try:
        for tensor, trained in others:
            tensor.requires_grad_(trained)
        yield
    finally:
        for tensor, trained in others:
            tensor.requires_grad_(not trained)


class Before:
    """A module's buffers and attributes, and those of all modules inside it."""

    __slots__ = ("_attributes", "_buffers", "_cache", "_tensors", "_trained")

    def __init__(self, module: nn.Module) -> None:
        self._buffers: list[tuple[nn.Module, _Buffers]] = []
        self._attributes: list[tuple[nn.Module, frozenset[str], dict[str, Any]]] = []
        for part in module.modules():
            if part._buffers:
                self._buffers.append((part, buffers_read(part)))
            if not type(part).__module__.startswith("torch.nn.modules."):
                had = {name: _copy(value) for name, value in part.__dict__.items() if _put_back(name, value)}
                self._attributes.append((part, frozenset(part.__dict__), had))
        self._tensors = [
            (name, type(part).__name__, tensor, version_of(tensor))
            for part, _, had in self._attributes
            for name, value in had.items()
            for tensor in _tensors_in(value)
        ]
        # what `parametrize.cached()` has is not computed again
        self._cache = parametrize._cache_enabled, parametrize._cache.copy()
        self._trained = [(tensor, tensor.requires_grad) for _, _, tensor, _ in self._tensors]

    def changed(self) -> str:
        """The first buffer that is another one now, or was changed in place; or a tensor that was changed in place.

        A tensor that is another one now was let go of by the module, not by this: it is put back when it runs again.
        """
        for part, buffers in self._buffers:
            for name, (buffer, version) in buffers.items():
                if part._buffers.get(name) is not buffer or version_of(buffer) != version:
                    return f"the buffer {name} of a {type(part).__name__}"
        for name, of, tensor, version in self._tensors:
            if version_of(tensor) != version:
                return f"the tensor {name} of a {of}"
        return ""

    @contextlib.contextmanager
    def attributes(self) -> Iterator[None]:
        """Attributes as they were inside, and as they are now after that.

        Raises:
            RuntimeError: one of the tensors was changed in place since.
        """
        for name, of, tensor, version in self._tensors:
            if version_of(tensor) != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"the tensor {name} {[*tensor.shape]} of a {of} that runs again is at version {tensor._version}; "
                    f"expected version {version} instead"
                )
        now = [dict(part.__dict__) for part, _, _ in self._attributes]
        cache = parametrize._cache_enabled, parametrize._cache
        parametrize._cache_enabled, parametrize._cache = self._cache[0], self._cache[1].copy()
        try:
            for part, names, had in self._attributes:
                for name in part.__dict__.keys() - names:
                    del part.__dict__[name]
                part.__dict__.update({name: _copy(value) for name, value in had.items()})
            with trained_as(self._trained):
                yield
        finally:
            parametrize._cache_enabled, parametrize._cache = cache
            for (part, _, _), then in zip(self._attributes, now, strict=True):
                for name in part.__dict__.keys() - then.keys():
                    del part.__dict__[name]
                part.__dict__.update(then)


def _put_back(name: str, value: Any) -> bool:
    return name not in _OF_TORCH and (type(value) in (*PLAIN, *_SEVERAL) or isinstance(value, torch.Tensor))


def _copy(value: Any) -> Any:
    return value.copy() if type(value) in _SEVERAL else value


def _tensors_in(value: Any) -> list[torch.Tensor]:
    inside = value.values() if type(value) is dict else value if type(value) in _SEVERAL else (value,)
    return [one for one in inside if isinstance(one, torch.Tensor)]
