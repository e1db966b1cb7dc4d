"""The stage of a capture: fake models and inputs, autocast without a GPU, and the optimizer's step."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

__all__ = ["autocast_as_on_cuda", "faked", "lowered_to_bfloat16", "make_optimizer", "outside_the_engine", "short"]


@contextlib.contextmanager
def autocast_as_on_cuda(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """`torch.autocast`, which refuses "cuda" on a machine without one."""
    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


@contextlib.contextmanager
def outside_the_engine() -> Iterator[None]:
    """What library code asks for during a backward that is not the engine's.

    Non-reentrant checkpointing recomputes once for a graph task; optimizers read their step counter.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch._C, "_current_graph_task_id", return_value=1))
        adam = importlib.import_module("torch.optim.adam")  # torch.optim hides the submodule
        stack.enter_context(mock.patch.object(adam, "_get_value", return_value=2.0))
        yield


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer | None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=True)
    if name == "adamw":
        return torch.optim.AdamW(parameters, foreach=True)
    return None


def faked(mode: FakeTensorMode, device: str, what: Any) -> Any:
    """The same structure with fake tensors on `device`; the real ones are not touched."""

    def fake(tensor: torch.Tensor, needs_grad: bool) -> torch.Tensor:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return made.requires_grad_(needs_grad)

    if isinstance(what, nn.Module):
        memo: dict[int, Any] = {}
        for parameter in what.parameters():
            memo[id(parameter)] = nn.Parameter(fake(parameter, False), requires_grad=parameter.requires_grad)
        for buffer in what.buffers():
            memo[id(buffer)] = fake(buffer, False)
        return copy.deepcopy(what, memo)
    return tree_map_only(torch.Tensor, lambda t: fake(t, t.requires_grad), what)


def lowered_to_bfloat16(model: nn.Module, given: Any) -> tuple[nn.Module, Any]:
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                lowered = nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=parameter.requires_grad)
                module._parameters[key] = lowered
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[key] = buffer.to(torch.bfloat16)
    return model, tree_map_only(torch.Tensor, lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t, given)


def short(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
