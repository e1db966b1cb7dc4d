"""Saved storages that are dropped after forward and computed again by their modules when backward asks.

    forward   source packed      the first module's input, which autograd saves too: noted
              module calls end   each must take what the one before gave; after the last one the storage is dropped
    backward  first unpack       the source is unpacked, the modules run once more under no_grad, as they were

Nothing is dropped before everything was checked: an input, an output or a module that is not as the plan says leaves
the storage where it is. Modules run with the parameters they had, on copies of their buffers (statistics are updated
once), in the mode and under the autocast they ran in. Same kernels on the same bytes give the same bits.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vdnn.calls import Hook
from vdnn.engine.before import Before, buffers_read, trained_as, version_of
from vdnn.engine.device import Device, byte_view, is_plain
from vdnn.engine.remade import RemadeStorage
from vdnn.engine.storage import extent, same_counter, typed

__all__ = ["ChainRun", "Layout", "RecomputedStorage", "Rerun"]


class Layout:
    """Where a tensor lies in its storage, and as what."""

    __slots__ = ("dtype", "first", "nbytes", "offset", "shape", "storage", "stride", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.storage = tensor.untyped_storage()._cdata
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()
        self.dtype = tensor.dtype
        self.version = version_of(tensor)
        self.first, self.nbytes = extent(tensor)

    def holds(self, other: Layout) -> bool:
        """Whether the other's bytes are among these, both being there now."""
        return (
            (self.storage, self.version, self.dtype) == (other.storage, other.version, other.dtype)
            and self.first <= other.first
            and other.first + other.nbytes <= self.first + self.nbytes
        )

    def of(self, tensor: torch.Tensor, outer: Layout) -> torch.Tensor:
        """This view of a tensor that lies as `outer` did."""
        return tensor.as_strided(self.shape, self.stride, int(tensor.storage_offset()) + self.offset - outer.offset)

    def same_form(self, other: Layout) -> bool:
        return (self.shape, self.stride, self.offset, self.dtype) == (
            other.shape,
            other.stride,
            other.offset,
            other.dtype,
        )


class Rerun:
    """One module call, to be made again."""

    __slots__ = ("autocast", "before", "buffers", "module", "parts", "trained", "versions")

    def __init__(self, module: nn.Module, device: str, before: Before) -> None:
        self.module = module
        self.before = before
        self.buffers = [pair for m in module.modules() if m._buffers for pair in buffers_read(m).values()]
        self.parts = [(m, dict(m._parameters), dict(m._buffers), m.training) for m in module.modules()]
        self.versions = [version_of(p) for p in self._parameters()]
        both = (t for _, parameters, buffers, _ in self.parts for t in (*parameters.values(), *buffers.values()))
        self.trained = [(tensor, tensor.requires_grad) for tensor in both if tensor is not None]
        self.autocast = (
            device,
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
            torch.is_autocast_cache_enabled(),
        )

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.run((given,), {}, grad=False)
        return found

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], grad: bool) -> Any:
        """The module's forward, as it was; `grad` says whether autograd watches."""
        for parameter, version in zip(self._parameters(), self.versions, strict=True):
            if version_of(parameter) != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"a parameter {list(parameter.shape)} of a {type(self.module).__name__}, with which a feature map "
                    f"is computed again, is at version {parameter._version}; expected version {version} instead"
                )
        for buffer, version in self.buffers:
            if version_of(buffer) != version:
                raise RuntimeError(
                    f"a buffer {list(buffer.shape)} of a {type(self.module).__name__}, with which a feature map is "
                    f"computed again, was changed since forward: it is at version {buffer._version}; expected version "
                    f"{version} instead. Change it after backward, or plan without recomputation"
                )
        device, enabled, dtype, cache = self.autocast
        with (
            torch.set_grad_enabled(grad),
            torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache),
            self.before.attributes(),
            trained_as(self.trained),
            self._as_it_was(),
        ):
            return self.module.forward(*args, **kwargs)

    def _parameters(self) -> list[torch.Tensor]:
        return [p for _, parameters, _, _ in self.parts for p in parameters.values() if p is not None]

    @contextlib.contextmanager
    def _as_it_was(self) -> Iterator[None]:
        now = [
            {name: m.__dict__[name] for name in ("_parameters", "_buffers", "training")} for m, _, _, _ in self.parts
        ]
        try:
            for module, parameters, buffers, training in self.parts:
                copies = {name: None if b is None else _copy(b) for name, b in buffers.items()}
                module.__dict__.update(_parameters=dict(parameters), _buffers=copies, training=training)
            yield
        finally:
            for (module, _, _, _), before in zip(self.parts, now, strict=True):
                module.__dict__.update(before)


def _copy(buffer: torch.Tensor) -> torch.Tensor:
    """A copy that autograd sees as it sees the buffer, which may be computed from what is trained."""
    return buffer.detach().clone().requires_grad_(buffer.requires_grad)


class ChainRun:
    """The module calls of one plan entry while forward runs: whether each takes what the one before gave."""

    __slots__ = ("before", "broken", "done", "given", "last", "layout", "links", "out", "source", "storage", "taken")

    def __init__(self) -> None:
        self.source: Any = None  # what the pack hook gave autograd for the first module's input
        self.taken: Layout | None = None
        self.given: Layout | None = None
        self.before: Before | None = None  # of the module that runs
        self.links: list[Rerun] = []
        self.last: weakref.ref[torch.Tensor] | None = None
        self.out: weakref.ref[torch.UntypedStorage] | None = None
        self.layout: Layout | None = None
        self.storage: weakref.ref[RecomputedStorage] | None = None  # made at its first pack
        self.done = False
        self.broken = ""

    def begins_with(self, packed: Any, tensor: torch.Tensor) -> None:
        """The first module's input was packed."""
        self.source, self.taken = packed, Layout(tensor)

    def begins(self, module: nn.Module) -> None:
        """A module call of the chain begins."""
        self.before = Before(module)

    def link(self, module: nn.Module, args: tuple[Any, ...], output: Any, last: bool) -> None:
        """A module call of the chain is over."""
        if not self.broken:
            self.broken = self._wrong(module, args, output, last)
        if self.broken:
            self.source = None
            self.links.clear()
            return
        assert self.before is not None
        self.links.append(Rerun(module, output.device.type, self.before))
        self.last = weakref.ref(output)
        if last:
            self.done = True
            self.layout = Layout(output)
            self.out = weakref.ref(output.untyped_storage())
            storage = self.storage() if self.storage is not None else None
            if storage is not None and storage.is_of(output):
                storage.drop(self)

    def _wrong(self, module: nn.Module, args: tuple[Any, ...], output: Any, last: bool) -> str:
        name = type(module).__name__
        if len(args) != 1 or not is_plain(args[0]) or not is_plain(output):
            return f"a {name} takes or gives other than one tensor"
        if not all(is_plain(p) for p in (*module.parameters(), *module.buffers())):
            return f"a {name} has parameters of a kind of their own"
        if any(not isinstance(hook, Hook) for hook in module._forward_hooks.values()):
            return f"a {name} has forward hooks, which may change what it gives"
        changed = self.before.changed() if self.before is not None else "what it is"
        if changed:
            return f"a {name} changes {changed}, and may depend on it"
        if not self.links:
            self.given = Layout(args[0])
            if self.taken is None or not self.taken.holds(self.given):
                return f"a {name} saves another tensor than its input"
        if self.links and (self.last is None or self.last() is not args[0]):
            return f"a {name} takes another tensor than the module before it gave"
        if last and (output.storage_offset() or output.untyped_storage().nbytes() != output.nbytes):
            return f"a {name} gives a view of something larger"
        return ""

    def kept(self) -> tuple[int, str]:
        """The bytes of what stood for the chain's storage and stays after all, now that the chain is over, and why."""
        storage = self.storage() if self.storage is not None else None
        if storage is None or storage.dropped:
            return 0, ""
        return storage.nbytes, self.broken or "its modules gave another tensor"

    def standing(self, device: Device, tensor: torch.Tensor) -> tuple[RecomputedStorage | None, bool, str]:
        """What stands for the chain's storage, whether it is new; None, and why, where nothing can."""
        if self.broken:
            return None, False, self.broken
        known = self.storage() if self.storage is not None else None
        if known is not None and (known.is_of(tensor) or (self._made(tensor) and known.counts_as(tensor))):
            return known, False, ""
        # a first object may be made: the chain is not over, or ended in this storage
        if known is not None or (self.done and not self._made(tensor)):
            return None, False, "its modules gave another tensor, or this one was changed since"
        made = RecomputedStorage(device, tensor)
        self.storage = weakref.ref(made)
        if self.done:
            made.drop(self)
        return made, True, ""

    def _made(self, tensor: torch.Tensor) -> bool:
        """Whether the chain's last module gave this storage, as it is now."""
        return (
            self.done
            and self.layout is not None
            and self.out is not None
            and self.out() is tensor.untyped_storage()
            and tensor._version == self.layout.version
        )


@dataclass(frozen=True, slots=True)
class _Chain:
    """How a storage is made again: what was packed of the first module's input, and where in it that input lies."""

    source: Any
    taken: Layout
    given: Layout
    links: tuple[Rerun, ...]
    gives: Layout


class RecomputedStorage(RemadeStorage):
    """One storage that is dropped and computed again. Its owner makes every call under one lock."""

    __slots__ = ("_alias", "_chain")

    def __init__(self, device: Device, source: torch.Tensor) -> None:
        super().__init__(device, source)
        self._alias: torch.Tensor | None = source.detach()  # until the chain is known to make it again
        self._chain: _Chain | None = None

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether this stands for the tensor's storage as it is now; only while it was not dropped."""
        alias = self._alias
        return (
            alias is not None
            and alias.untyped_storage()._cdata == tensor.untyped_storage()._cdata
            and same_counter(alias, tensor, alias._version)
        )

    def drop(self, run: ChainRun) -> None:
        """Let go of the device memory: the chain makes it again."""
        assert run.layout is not None
        assert run.taken is not None
        assert run.given is not None
        self._chain = _Chain(run.source, run.taken, run.given, tuple(run.links), run.layout)
        self._alias = None

    @property
    def dropped(self) -> bool:
        """Whether the bytes are nowhere now."""
        return self._alias is None and self._buffer is None

    def make(self, unpack: Callable[[Any], torch.Tensor]) -> int:
        """Compute it again.

        Returns: how many storages came back.

        Raises:
            RuntimeError: what it is made from was changed in place since, or a module gives something else now.
            torch.OutOfMemoryError, DeviceOutOfMemory: no room; it may be tried again.
        """
        assert self._chain is not None
        chain = self._chain
        tensor = chain.given.of(unpack(chain.source), chain.taken)
        for link in chain.links:
            tensor = link(tensor)
        if not is_plain(tensor) or not chain.gives.same_form(Layout(tensor)):
            raise RuntimeError(
                f"a feature map that {type(chain.links[-1].module).__name__} computes again comes out another way than "
                f"{list(chain.gives.shape)} of {chain.gives.dtype} with strides {chain.gives.stride}. If the module "
                "depends on more than its input, plan without recomputation"
            )
        self._hold(self._device.adopt(tensor, 0, self.nbytes))
        return 1

    def fetch(self, dtype: torch.dtype) -> tuple[torch.Tensor, int, int]:
        """As of every storage that is made again; the original while it was not dropped."""
        if self._buffer is None:
            assert self._alias is not None
            return typed(byte_view(self._alias, 0, self.nbytes), dtype), 0, 0
        return super().fetch(dtype)
