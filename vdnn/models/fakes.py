"""Building models on fake tensors: what asks for values gets none, or gets real ones.

Two habits of model code fail under `FakeTensorMode`, where tensors have shapes but no values:

* initialisers look at the numbers they drew: on fakes, weights are left as they are;
* rates and widths are computed with small tensors on the CPU and read back with `.tolist()`: with
  `cpu_numbers_are_real`, tensors made with an explicit `device="cpu"` stay real.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["cpu_numbers_are_real", "initialisers_skipped", "on_fakes"]


def on_fakes() -> bool:
    """Whether tensors that are made now are fake."""
    return detect_fake_mode() is not None


@contextlib.contextmanager
def initialisers_skipped() -> Iterator[None]:
    """On fake tensors, `torch.nn.init` leaves weights as they are."""
    if not on_fakes():
        yield
        return
    with contextlib.ExitStack() as stack:
        for name in [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]:
            stack.enter_context(mock.patch.object(nn.init, name, _careful(getattr(nn.init, name))))
        yield


def _careful(initialise: Callable[..., Any]) -> Callable[..., Any]:
    """The initialiser, but for fakes. A library that is first imported now keeps what it finds in `nn.init`."""

    def initialise_unless_fake(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return tensor if isinstance(tensor, FakeTensor) else initialise(tensor, *args, **kwargs)

    return initialise_unless_fake


class _RealNumbers(TorchFunctionMode):
    """Lets functions run for real that make or read tensors with an explicit device="cpu", or are in `makers`."""

    def __init__(self, makers: tuple[Callable[..., Any], ...]) -> None:
        super().__init__()
        self.makers = makers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        named = kwargs.get("device")
        if func in self.makers and "device" not in kwargs:  # modules pass one, even if None, for their buffers
            kwargs, named = {**kwargs, "device": "cpu"}, "cpu"
        makes = not tensors and named is not None and torch.device(named).type == "cpu"
        if makes or (tensors and not fakes):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if len(fakes) < len(tensors):
            args, kwargs = tree_map_only(Tensor, _faked, (args, kwargs))
        return func(*args, **kwargs)


def _faked(tensor: Tensor) -> Tensor:
    mode = detect_fake_mode()
    if isinstance(tensor, FakeTensor) or mode is None:
        return tensor
    fake: Tensor = mode.from_tensor(tensor)
    return fake


@contextlib.contextmanager
def cpu_numbers_are_real(*makers: Callable[..., Any]) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """While a model is built on fakes, explicit CPU tensors are real, and those that `makers` make without a device.

    The function that it gives turns the buffers of the finished model into fakes, those made from real ones too.
    """
    if not on_fakes():
        yield lambda model: model
        return

    def finished(model: nn.Module) -> nn.Module:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = _faked(buffer)
        return model

    with _RealNumbers(makers):
        yield finished
