"""The stage of a capture: fake models and inputs, autocast without a GPU, and the optimizer's step."""

from __future__ import annotations

import contextlib
import copy
import importlib
import random
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

from vdnn.errors import CaptureError

__all__ = [
    "autocast_as_on_cuda",
    "channels_last",
    "faked",
    "lowered_to_bfloat16",
    "make_optimizer",
    "outside_the_engine",
    "short",
    "undisturbed",
]


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
    """What library code asks for during a step that no GPU and no engine runs.

    Non-reentrant checkpointing recomputes once for a graph task; optimizers read their step counter; `autocast`
    asks for the GPU; transformers, which cannot see the positions, would mask as if sequences were packed.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch._C, "_current_graph_task_id", return_value=1))
        adam = importlib.import_module("torch.optim.adam")  # torch.optim hides the submodule
        stack.enter_context(mock.patch.object(adam, "_get_value", return_value=2.0))
        amp = importlib.import_module("torch.cuda.amp.common")
        stack.enter_context(mock.patch.object(amp, "amp_definitely_not_available", return_value=False))
        stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True))
        masks = sys.modules.get("transformers.masking_utils")
        packed = getattr(masks, "find_packed_sequence_indices", None)
        if masks is not None and packed is not None:
            stack.enter_context(mock.patch.object(masks, packed.__name__, lambda ids: (packed(ids), None)[1]))
        yield


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """The step's own surroundings whatever the caller's are, and the caller's random numbers as they were.

    Gradients on, autocast off, compiled modules run as they were written. A model that copies parts of itself while it
    is built copies fake tensors, and would copy their mode with them: two modes do not mix.
    """
    numpy = sys.modules.get("numpy")
    drawn = random.getstate(), torch.get_rng_state(), numpy.random.get_state() if numpy is not None else None
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    before = {kind: torch.is_autocast_enabled(kind) for kind in ("cuda", "cpu")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_as_written())
        stack.enter_context(mock.patch.object(parametrize, "_cache", {}))  # the caller's is of real tensors
        stack.enter_context(mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True))
        for kind in before:
            torch.set_autocast_enabled(kind, False)
        try:
            yield
        finally:
            for kind, enabled in before.items():
                torch.set_autocast_enabled(kind, enabled)
            random.setstate(drawn[0])
            torch.set_rng_state(drawn[1])
            if numpy is not None:
                numpy.random.set_state(drawn[2])
            if on_gpu is not None:
                torch.cuda.set_rng_state_all(on_gpu)


@contextlib.contextmanager
def _as_written() -> Iterator[None]:
    """Compiled modules run as they were written, and what is compiled meanwhile is left as it is."""
    if "torch._dynamo.eval_frame" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:  # nothing is compiled yet, and asking for the stance would load the compiler

        def unchanged(model: Any = None, **_: Any) -> Any:
            return model if model is not None else lambda given: given

        with mock.patch.object(torch, "compile", unchanged):
            yield


def make_optimizer(name: str, model: nn.Module, impl: str = "foreach") -> torch.optim.Optimizer | None:
    """The optimizer by name, in one of torch's three implementations."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return None
    how: dict[str, Any] = {"foreach": impl == "foreach", "fused": impl == "fused"}
    if name in ("sgd", "sgd-nesterov"):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=name == "sgd-nesterov", **how)
    if name == "adamw":
        return torch.optim.AdamW(parameters, **how)
    return None


def faked(mode: FakeTensorMode, device: str, what: Any) -> Any:
    """The same structure with fake tensors on `device`; the real ones are not touched.

    Tensors that share a storage share one again.

    Raises:
        CaptureError: a tensor whose memory is not one storage (sparse, nested, quantized, a wrapper's).
    """
    found = _tensors_of(what) if isinstance(what, nn.Module) else dict.fromkeys(_leaves(what), "an input")
    users: dict[int, int] = {}
    for tensor, name in found.items():
        _refuse_strange(tensor, name)
        users[_place(tensor)] = users.get(_place(tensor), 0) + 1
    storages: dict[int, torch.UntypedStorage] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        place = _place(tensor)
        if users[place] == 1 or tensor.device.type == "meta":
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if place not in storages:
            nbytes = tensor.untyped_storage().nbytes()
            storages[place] = torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()
        made = torch.empty(0, dtype=tensor.dtype, device=device)
        cached, mode.cache_enabled = mode.cache_enabled, False  # the cache would keep the storage
        try:
            return made.set_(storages[place], tensor.storage_offset(), tensor.shape, tensor.stride())
        finally:
            mode.cache_enabled = cached

    memo: dict[int, Any] = {}
    with torch.no_grad():
        for tensor in found:
            made = fake(tensor)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                made.__dict__.update({k: v for k, v in vars(tensor).items() if not isinstance(v, torch.Tensor)})
            elif tensor.is_leaf or not isinstance(what, nn.Module):
                made.requires_grad_(tensor.requires_grad)
            memo[id(tensor)] = made
    if isinstance(what, nn.Module):
        return copy.deepcopy(what, memo)
    return tree_map_only(torch.Tensor, lambda t: memo[id(t)], what)


def _leaves(what: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(what) if isinstance(leaf, torch.Tensor)]


def _tensors_of(model: nn.Module) -> dict[torch.Tensor, str]:
    """Parameters, buffers, and tensors that are plain attributes of modules, with their names."""
    found: dict[torch.Tensor, str] = {}
    for fqn, module in model.named_modules():
        for key, value in {**vars(module), **module._buffers, **module._parameters}.items():
            if key.startswith("_") and not isinstance(value, torch.Tensor):
                continue  # torch's own dictionaries
            for tensor in _leaves(value) if isinstance(value, torch.Tensor | list | tuple | dict) else ():
                found.setdefault(tensor, f"{fqn}.{key}" if fqn else key)
    return found


def _place(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _refuse_strange(tensor: torch.Tensor, name: str) -> None:
    what = ""
    wrapper = bool(is_traceable_wrapper_subclass(tensor))
    if is_lazy(tensor):
        what = "has no shape yet (a lazy module): run forward once before"
    elif tensor.layout is not torch.strided or tensor.is_nested:
        what = f"has layout {tensor.layout}: a capture knows dense tensors only; give it a dense one"
    elif tensor.is_quantized:
        what = f"is quantized ({tensor.dtype}): a capture knows plain tensors only"
    elif wrapper:
        what = f"is a {type(tensor).__name__}, which wraps other tensors: a capture knows plain tensors only"
    if what:
        raise CaptureError(f"{name} {what}")


def lowered_to_bfloat16(model: nn.Module, given: Any) -> tuple[nn.Module, Any]:
    lowered: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_floating_point():
                if parameter not in lowered:  # two modules may share one
                    data = parameter.detach().to(torch.bfloat16)
                    lowered[parameter] = nn.Parameter(data, requires_grad=parameter.requires_grad)
                setattr(module, key, lowered[parameter])  # recurrent layers keep a list of theirs besides
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[key] = buffer.to(torch.bfloat16)
    return model, tree_map_only(torch.Tensor, lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t, given)


def channels_last(model: nn.Module, given: Any) -> tuple[nn.Module, Any]:
    """The model and its inputs with images and kernels in NHWC."""

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():  # `model.to` cannot exchange the data of a fake parameter
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.dim() == 4:
                if parameter not in moved:  # two modules may share one
                    data = changed(parameter.detach())
                    moved[parameter] = nn.Parameter(data, requires_grad=parameter.requires_grad)
                setattr(module, key, moved[parameter])
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = changed(buffer)
    return model, tree_map_only(torch.Tensor, changed, given)


def short(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
