"""`Before`: what a module's output may depend on beside its input and its weights, as it was when its call began.

    before = Before(module)     when the call begins
    before.changed()            when it is over: a buffer that it changed, in words; "" if there is none
    with before.attributes():   each module inside has the numbers and texts that it had then

A module that runs again is on copies of its buffers as they are then. Where its own call changes them and its output
depends on them (the vectors of `spectral_norm`, a moving mean that is subtracted), it would give something else.
The statistics of a batch norm in training are written, and not read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["Before", "buffers_read"]

_PLAIN = (int, float, bool, str, type(None))
_Buffers = dict[str, tuple[torch.Tensor, int]]


def buffers_read(module: nn.Module) -> _Buffers:
    """The module's own buffers that its output may depend on, with their versions."""
    # whoever writes a norm of their own may read what torch's and timm's only write
    author = getattr(type(module).forward, "__module__", "").partition(".")[0]
    if isinstance(module, _NormBase) and module.training and author in ("torch", "timm"):
        return {}
    return {name: (buffer, buffer._version) for name, buffer in module._buffers.items() if buffer is not None}


class Before:
    """A module's buffers and plain attributes, and those of all modules inside it."""

    __slots__ = ("_attributes", "_buffers")

    def __init__(self, module: nn.Module) -> None:
        self._buffers: list[tuple[nn.Module, _Buffers]] = []
        self._attributes: list[tuple[nn.Module, frozenset[str], dict[str, Any]]] = []
        for part in module.modules():
            if part._buffers:
                self._buffers.append((part, buffers_read(part)))
            if not type(part).__module__.startswith("torch.nn.modules."):
                plain = {name: value for name, value in part.__dict__.items() if type(value) in _PLAIN}
                self._attributes.append((part, frozenset(part.__dict__), plain))

    def changed(self) -> str:
        """The first buffer that is another one now, or was changed in place."""
        for part, buffers in self._buffers:
            for name, (buffer, version) in buffers.items():
                if part._buffers.get(name) is not buffer or buffer._version != version:
                    return f"the buffer {name} of a {type(part).__name__}"
        return ""

    @contextlib.contextmanager
    def attributes(self) -> Iterator[None]:
        """Numbers and texts as they were inside, and all attributes as they are now after that."""
        now = [dict(part.__dict__) for part, _, _ in self._attributes]
        try:
            for part, names, plain in self._attributes:
                for name in part.__dict__.keys() - names:
                    del part.__dict__[name]
                part.__dict__.update(plain)
            yield
        finally:
            for (part, _, _), then in zip(self._attributes, now, strict=True):
                for name in part.__dict__.keys() - then.keys():
                    del part.__dict__[name]
                part.__dict__.update(then)
