"""Records ops and the lives of storages while a step runs."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vdnn.tracing.hidden import hidden_copies
from vdnn.tracing.kernels import describe, touched_bytes
from vdnn.tracing.shortcuts import shortcut
from vdnn.values import Op

__all__ = ["Recorder", "Store"]


class Store:
    """One storage while it is watched. Positions as in `Trace`; `dead` is None while it lives."""

    __slots__ = ("alloc", "category", "dead", "free", "held", "name", "nbytes", "need", "packed", "ref", "restored")

    def __init__(self, nbytes: int, alloc: int) -> None:
        self.nbytes = nbytes
        self.alloc = alloc
        self.category = ""
        self.name = ""
        self.held = ""
        self.need = -1
        self.packed = False
        self.dead: int | None = None  # where its own memory ended
        self.free: int | None = None  # where the copy that backward was given ended
        self.ref: Any = None
        self.restored: Any = None


_CLONE = torch.ops.aten.clone.default
_DEVICE = torch.ops.prim.device.default


class Recorder(TorchDispatchMode):
    """A dispatch mode above the fake one."""

    def __init__(self, device: str, rules: dict[Any, Any], mode: FakeTensorMode, copies: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.mode = mode
        self.copies = copies  # whether kernels copy what is not contiguous, as CUDA's do
        self.rules = rules  # ops that run otherwise than torch has it
        self.ops: list[Op] = []
        self.stores: list[Store] = []
        self.phase: Any = "forward"
        self.module = -1
        self.module_name = ""
        self.active = True
        self.node = ""  # the autograd node that runs
        self._index: dict[int, int] = {}

    def store_of(self, tensor: torch.Tensor, alloc: int = -1) -> int:
        """Number of the tensor's storage; a storage not seen before begins at `alloc`."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        number = self._index.get(key)
        if number is None:
            number = len(self.stores)
            store = Store(storage.nbytes(), alloc)
            store.ref = weakref.ref(storage, partial(self._died, number, key))
            self.stores.append(store)
            self._index[key] = number
        return number

    def alias(self, storage: torch.UntypedStorage, number: int) -> None:
        """A storage that stands for another, given to backward: its end is noted as the other's."""
        key = storage._cdata
        self._index[key] = number
        store = self.stores[number]
        store.restored = weakref.ref(storage, partial(self._restored_died, number, key))

    def _died(self, number: int, key: int, _: object) -> None:
        if self._index.get(key) == number:
            del self._index[key]
        self.stores[number].dead = len(self.ops)

    def _restored_died(self, number: int, key: int, _: object) -> None:
        if self._index.get(key) == number:
            del self._index[key]
        self.stores[number].free = len(self.ops)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in a capture, and the wrapper that torch puts around would load its compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].fake_device if type(args[0]) is FakeTensor else func(*args)
        kwargs = kwargs or {}
        if func is _CLONE and self.node.startswith("Cudnn") and args[0].dtype is torch.uint8:
            return args[0]  # cuDNN's reserve is copied for a graph that is kept; without the engine every graph is
        rule = self.rules.get(func)
        if rule is not None:
            out = rule(args)
        else:
            out = shortcut(self.mode, func, args, kwargs)
            if out is None:
                out = func(*args, **kwargs)
        weight = _WEIGHT_OF_NORM.get(func)
        if weight is not None:
            out = _with_full_statistics(args[0], args[weight], out)
        if not self.active or func.namespace == "prim":
            return out
        ins = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and self._here(t)]
        outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and self._here(t)]
        if not ins and not outs:
            return out
        here = len(self.ops)
        fresh = func is torch.ops.aten.lift_fresh.default  # a tensor made from a number, seen first as an input
        reads = dict.fromkeys(self.store_of(t, here if fresh else -1) for t in ins)
        before = len(self.stores)
        made = dict.fromkeys(self.store_of(t, here) for t in outs)
        aliases = bool(outs) and all(n in reads for n in made)
        kernel, dims, flops = describe(func, args, kwargs, out, aliases)
        writes = tuple(made) if kernel != "view" else tuple(n for n in made if n >= before)
        written = outs
        if func._schema.is_mutable and not outs:
            written = _changed(func, args)
            writes = tuple(self.store_of(t) for t in written)
        first = outs[0] if outs else ins[0]
        self.ops.append(
            Op(
                name=str(func),
                phase=self.phase,
                module=self.module,
                kernel=kernel,
                dtype=str((ins[0] if ins else first).dtype).removeprefix("torch."),
                dims=dims,
                reads=tuple(reads),
                writes=writes,
                flops=flops,
                read_bytes=0 if kernel == "view" else sum(map(touched_bytes, ins)),
                written_bytes=0 if kernel == "view" else sum(map(touched_bytes, written)),
                workspace_bytes=hidden_copies(str(func), ins) if self.copies and kernel != "view" else 0,
            )
        )
        return out

    def _here(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self.device and tensor.layout is torch.strided


def _changed(func: Any, args: Any) -> list[torch.Tensor]:
    """What an op that gives nothing back writes to: the arguments that its schema marks, as foreach's first list."""
    marked = [
        given
        for argument, given in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [t for t in tree_leaves(marked or args[:1]) if isinstance(t, torch.Tensor)]


# Which argument is the weight.
_WEIGHT_OF_NORM = {
    torch.ops.aten.native_batch_norm.default: 1,
    torch.ops.aten.native_group_norm.default: 1,
    torch.ops.aten.native_layer_norm.default: 2,
}


def _with_full_statistics(given: torch.Tensor, weight: torch.Tensor | None, out: Any) -> Any:
    """The CPU's norms keep their statistics in the weight's dtype, where fakes say the input's (autocast)."""
    if given.device.type != "cpu" or weight is None or weight.dtype == given.dtype:
        return out
    return out[0], *(torch.empty_like(t, dtype=weight.dtype) for t in out[1:])
