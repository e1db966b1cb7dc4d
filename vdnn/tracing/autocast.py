"""CUDA's autocast on CPU tensors: which ops run in low precision, which in fp32, which in the widest dtype.

The CPU has lists of its own. While these rules are active, the kernels behind the CPU's autocast follow CUDA's
lists, which torch carries as macros in a header, so they are those of the installed version.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from vdnn.errors import CaptureError

__all__ = ["SAID", "cuda_lists_on_cpu"]

SAID = "autocast by CUDA's lists of ops, put in the place of the CPU's"
_LISTS = {"LOWER_PRECISION_FP": "lower", "FP32": "fp32", "FP32_SET_OPT_DTYPE": "set", "PROMOTE": "widest"}
_MACRO = re.compile(r"#define AT_FORALL_(\w+)\(_\)((?:[^\n]*\\\n)*[^\n]*\n)")
_ENTRY = re.compile(r"_\((\w+)(?:,\s*(\w+))?\)")
_KEY = "AutocastCPU"

Cast = Callable[[torch.Tensor], torch.Tensor]


def _rules() -> dict[Any, str]:
    """Op → what happens to its arguments.

    Raises:
        CaptureError: this torch comes without its headers.
    """
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    if not header.is_file():
        raise CaptureError(
            f"mixed precision cannot be captured for CUDA with this torch: {header} is missing, which lists the ops "
            "that autocast lowers; use a CUDA build of torch (it needs no GPU), or precision='bf16' or 'fp32'"
        )
    found: dict[Any, str] = {}
    for name, body in _MACRO.findall(header.read_text()):
        for op, overload in _ENTRY.findall(body) if name in _LISTS else ():
            packet = getattr(torch.ops.aten, op, None)
            overloads = packet.overloads() if packet is not None else []
            if (overload or "default") in overloads:
                found[getattr(packet, overload or "default")] = _LISTS[name]
    for overload in ("Scalar", "ScalarOpt_dim"):  # these have macros of their own
        found[getattr(torch.ops.aten.norm, overload)] = "fp32"
    return found


@contextlib.contextmanager
def cuda_lists_on_cpu() -> Iterator[None]:
    """The rules, and casts of weights remembered as long as it lasts, as in one `autocast` block."""
    rules = _rules()
    casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def lowered(tensor: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype("cpu")
        if not _eligible(tensor) or tensor.dtype is dtype:
            return tensor
        remembered = tensor.dtype is torch.float32 and tensor.is_leaf and tensor.requires_grad
        if not remembered or not torch.is_autocast_cache_enabled():
            return tensor.to(dtype)
        if id(tensor) not in casts:
            casts[id(tensor)] = tensor, tensor.to(dtype)
        return casts[id(tensor)][1]

    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is overridden: it is meant
            for name in torch._C._dispatch_get_registrations_for_dispatch_key(_KEY):
                base, _, overload = name.removeprefix("aten::").partition(".")
                if name.startswith("aten::") and hasattr(torch.ops.aten, base):
                    op = getattr(getattr(torch.ops.aten, base), overload or "default")
                    if op not in rules:
                        library.impl(op, torch.library.fallthrough_kernel, _KEY)
            for op, rule in rules.items():
                library.impl(op, _kernel(op, rule, lowered), _KEY)
        yield
    finally:
        library._destroy()
        casts.clear()


def _eligible(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype is not torch.float64


def _raised(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if _eligible(tensor) else tensor


def _kernel(op: Any, rule: str, lowered: Cast) -> Callable[..., Any]:
    takes_dtype = rule == "set" and any(argument.name == "dtype" for argument in op._schema.arguments)
    place = [argument.name for argument in op._schema.arguments].index("dtype") if takes_dtype else -1
    keyword = takes_dtype and op._schema.arguments[place].kwarg_only

    def run(*args: Any, **kwargs: Any) -> Any:
        if takes_dtype:
            given = kwargs.get("dtype") if keyword or len(args) <= place else args[place]
            if given is None and _eligible(args[0]):
                args, kwargs = (args if keyword else args[:place]), {**kwargs, "dtype": torch.float32}
        else:
            cast: Cast = _raised
            if rule == "lower":
                cast = lowered
            elif rule == "widest":
                tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and _eligible(t)]
                if not any(t.dtype is torch.float32 for t in tensors):
                    cast = lowered
            if rule != "set":
                leaves, form = tree_flatten((args, kwargs))
                for i in reversed(range(len(leaves))):  # compilers evaluate arguments from the last
                    leaves[i] = cast(leaves[i]) if isinstance(leaves[i], torch.Tensor) else leaves[i]
                args, kwargs = tree_unflatten(leaves, form)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY))):
            return op(*args, **kwargs)

    return run
