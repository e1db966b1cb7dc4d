"""Blocks of modules that run a second time in backward, and make all that the plan dropped in them.

    forward   block begins       the random generators' states are noted
              packs in it        what the plan drops gets an object each; the memory stays for now
              block returns      checked: its input is the plan's source, unchanged; then the memory goes. Without a
                                 source the input itself is held
    backward  first unpack       the source is unpacked, the block runs once more with its hooks on saved tensors: each
                                 pack is known by (module, call of it in the block, number), and what is wanted is kept

The run stops at the last pack that is wanted. It is the module's own forward with gradients on, so autograd packs what
it packed before; the graph it builds is dropped. Buffers are copies (statistics are updated once), parameters, mode,
autocast and random numbers those of forward.
"""

from __future__ import annotations

import contextlib
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from vdnn.calls import Frame, Hook
from vdnn.engine.before import PLAIN, Before, version_of
from vdnn.engine.device import Device, is_plain
from vdnn.engine.recomputed import Layout, RecomputedStorage, Rerun

__all__ = ["BlockRun", "BlockStorage"]

_Key = tuple[int, int, int]  # id of the module, call of it in the block, number of the pack in that call


class BlockStorage(RecomputedStorage):
    """One storage that is dropped when its block returns, and made again when the block runs again."""

    __slots__ = ("_layout", "_run", "key")

    def __init__(self, device: Device, source: torch.Tensor, key: _Key, run: BlockRun) -> None:
        super().__init__(device, source)
        self.key = key
        self._layout = Layout(source)
        self._run = run

    def packed_again(self, tensor: torch.Tensor, key: _Key) -> None:
        """Another pack of it: where it was changed in place before that, only what it is now may still be asked for."""
        if tensor._version != self._layout.version:
            self.key, self._layout = key, Layout(tensor)

    def let_go(self) -> None:
        """The block is over, and can make it again."""
        self._alias = None

    def make(self, unpack: Callable[[Any], torch.Tensor]) -> int:
        """Run the block again: this comes back, and whatever else of it is gone.

        Returns: how many storages came back.

        Raises:
            RuntimeError: what it is made from was changed in place since, or the block packs something else now.
            torch.OutOfMemoryError, DeviceOutOfMemory: no room; it may be tried again.
        """
        return self._run.again(unpack)

    def take(self, tensor: torch.Tensor) -> None:
        """That tensor, packed where this was packed, is what it was."""
        if not is_plain(tensor) or not self._layout.same_form(Layout(tensor)):
            raise RuntimeError(
                f"a block that runs again packs {list(tensor.shape)} of {tensor.dtype} with strides "
                f"{tuple(tensor.stride())} where it packed {list(self._layout.shape)} of {self._layout.dtype} with "
                f"strides {tuple(self._layout.stride)}. If it depends on more than its input, plan without it"
            )
        self._hold(self._device.adopt(tensor, 0, self.nbytes))


class BlockRun:
    """One call of a block, and what it takes to run it again. Its owner makes every call under one lock."""

    __slots__ = (
        "_args",
        "_base",
        "_before",
        "_began",
        "_holds",
        "_kwargs",
        "_place",
        "_rerun",
        "_rng",
        "_source",
        "_storages",
        "_taken",
        "broken",
        "over",
    )

    def __init__(self, frame: Frame, holds: bool) -> None:
        self.broken = ""
        self._holds = holds
        self.over = False
        self._began = _Given(frame)
        self._before = Before(frame.module)
        self._base: dict[int, int] = {}  # first call of each module in the block
        self._storages: dict[int, weakref.ref[BlockStorage]] = {}  # by plan entry
        self._place = _cuda_of(frame)
        self._rng = _generators(self._place)
        self._source: Any = None  # what the pack hook gave autograd for the block's input
        self._taken: Layout | None = None
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._rerun: Rerun | None = None

    # -- forward -----------------------------------------------------------------------------------

    def enters(self, frame: Frame) -> None:
        """A module call in the block begins."""
        self._base.setdefault(id(frame.module), frame.call)

    def begins_with(self, packed: Any, tensor: torch.Tensor) -> None:
        """The block's input was packed."""
        self._source, self._taken = packed, Layout(tensor)

    def stand_in(
        self, device: Device, entry: int, frame: Frame, tensor: torch.Tensor
    ) -> tuple[BlockStorage | None, bool, str]:
        """What stands for the storage of a plan's entry, whether it is new; None, and why, where nothing can."""
        weak = self._storages.get(entry)
        if weak is None:
            made = BlockStorage(device, tensor, self._key(frame), self)
            self._storages[entry] = weakref.ref(made)
            return made, True, ""
        known = weak()
        if known is None or not known.is_of(tensor):
            return None, False, "another one of its entry is"
        known.packed_again(tensor, self._key(frame))
        return known, False, ""

    def _key(self, frame: Frame) -> _Key:
        """Where the pack is that goes on, which is counted already."""
        return id(frame.module), frame.call - self._base[id(frame.module)], frame.packs - 1

    def ends(self, frame: Frame) -> None:
        """The block returns: what it saved goes, unless something is not as it must be."""
        self.broken = self._wrong(frame.module, frame.args, frame.kwargs)
        self.over = True
        if self.broken:
            self._source = None
            return
        kind = next(t.device.type for t in tree_leaves((frame.args, frame.kwargs)) if isinstance(t, torch.Tensor))
        self._rerun = Rerun(frame.module, kind, self._before)
        self._args = tuple(map(_kept, frame.args))
        if not self._holds:
            self._args = (_Placeholder(Layout(frame.args[0]), frame.args[0].requires_grad), *self._args[1:])
        self._kwargs = {name: _kept(arg) for name, arg in frame.kwargs.items()}
        for weak in self._storages.values():
            storage = weak()
            if storage is not None:
                storage.let_go()

    def _wrong(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        name = type(module).__name__
        if not self._holds and (not args or not is_plain(args[0])):
            return f"a {name} does not take its input as its first argument"
        if not any(isinstance(t, torch.Tensor) for t in tree_leaves((args, kwargs))):
            return f"a {name} takes no tensor that it can be seen to take"
        if not self._began.is_given(args, kwargs):
            return f"a {name} changes its input"
        changed = self._before.changed()
        if changed:
            return f"a {name} changes {changed}, and may depend on it"
        if not self._holds and (self._taken is None or not self._taken.holds(Layout(args[0]))):
            return f"a {name} saves another tensor than its input"
        if not all(is_plain(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)):
            return f"a {name} takes tensors of a kind of their own"
        if not all(is_plain(p) for p in (*module.parameters(), *module.buffers())):
            return f"a {name} has parameters of a kind of their own"
        if any(not isinstance(h, Hook) for m in module.modules() for h in m._forward_pre_hooks.values()):
            return f"a {name} has forward hooks, which would run a second time"
        if any(not isinstance(h, Hook) for m in module.modules() for h in m._forward_hooks.values()):
            return f"a {name} has forward hooks, which would run a second time"
        return ""

    # -- backward ----------------------------------------------------------------------------------

    def again(self, unpack: Callable[[Any], torch.Tensor]) -> int:
        """Run the block again, for whatever of it is wanted and gone; so many storages."""
        assert self._rerun is not None
        found = [weak() for weak in self._storages.values()]
        living = [storage for storage in found if storage is not None and storage.dropped]
        wanted = {storage.key: storage for storage in living}
        args = tree_map_only(_Held, _Held.get, self._args)
        if not self._holds:
            first, *others = args
            assert self._taken is not None
            given = first.layout.of(unpack(self._source), self._taken).detach().requires_grad_(first.requires_grad)
            args = (given, *others)
        kwargs = tree_map_only(_Held, _Held.get, self._kwargs)
        collector = _Collector(self._rerun.module, wanted)
        with _random_as(self._rng, self._place), collector.watching(), contextlib.suppress(_Enough):
            self._rerun.run(args, kwargs, grad=True)
        if wanted:
            name = type(self._rerun.module).__name__
            raise RuntimeError(
                f"a {name} that runs again does not pack {len(wanted)} of the tensors that it packed in forward. If it "
                "depends on more than its input, plan without it"
            )
        self._source = self._rerun = None  # nothing of it is gone any more
        self._args, self._kwargs = (), {}
        return len(living)


class _Placeholder:
    """Stands for the block's input until it is unpacked."""

    __slots__ = ("layout", "requires_grad")

    def __init__(self, layout: Layout, requires_grad: bool) -> None:
        self.layout = layout
        self.requires_grad = requires_grad


class _Held:
    """Another tensor that the block takes, kept as it is: autograd holds what made it as long as the block's graph."""

    __slots__ = ("_tensor", "_trained", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._trained = tensor.requires_grad
        self._version = version_of(tensor)

    def get(self) -> torch.Tensor:
        tensor = self._tensor
        if version_of(tensor) != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor {list(tensor.shape)} that a block takes, which runs again, is at version {tensor._version}; "
                f"expected version {self._version} instead"
            )
        return tensor if tensor.requires_grad is self._trained else tensor.detach().requires_grad_(self._trained)


class _Given:
    """What a block is called with, so that it is known whether the block left it as it was: a list may be filled."""

    __slots__ = ("_form", "_leaves")

    def __init__(self, frame: Frame) -> None:
        leaves, self._form = tree_flatten((frame.args, frame.kwargs))
        self._leaves = [_Leaf(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

    def is_given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether these are the same tensors, unchanged, and the same other things, at the same places."""
        leaves, form = tree_flatten((args, kwargs))
        return bool(form == self._form) and all(
            known.is_of(leaf) if isinstance(known, _Leaf) else known is leaf or (type(leaf) in PLAIN and known == leaf)
            for known, leaf in zip(self._leaves, leaves, strict=True)
        )


class _Leaf:
    """A tensor that a block is called with; it is not held."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._version = version_of(tensor)

    def is_of(self, other: Any) -> bool:
        """Whether this is the tensor as it was. A hook on the module's backward gives it an alias of it."""
        tensor = self._tensor()
        if tensor is None or not isinstance(other, torch.Tensor) or version_of(other) != self._version:
            return False
        if tensor is other:
            return True
        if not (is_plain(tensor) and is_plain(other)):
            return False
        one, two = Layout(tensor), Layout(other)
        return one.same_form(two) and one.holds(two)


def _kept(value: Any) -> Any:
    return tree_map_only(torch.Tensor, _Held, value)


class _Enough(Exception):
    """Everything that is wanted has been packed."""


class _Collector:
    """Knows each pack of a run by its place, as in forward, and keeps those that are wanted."""

    def __init__(self, root: nn.Module, wanted: dict[_Key, BlockStorage]) -> None:
        self._known = {id(module) for module in root.modules()}
        self._wanted = wanted
        self._counts: dict[int, int] = {id(root): 1}
        self._frames = [[id(root), 0, 0]]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        before = register_module_forward_pre_hook(self._begin)
        after = register_module_forward_hook(self._end, always_call=True)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _never):
                yield
        finally:
            before.remove()
            after.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._known:
            call = self._counts.get(id(module), 0)
            self._counts[id(module)] = call + 1
            self._frames.append([id(module), call, 0])

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in self._known:
            self._frames.pop()

    def _pack(self, tensor: torch.Tensor) -> None:
        frame = self._frames[-1]
        storage = self._wanted.pop((frame[0], frame[1], frame[2]), None)
        frame[2] += 1
        if storage is not None:
            storage.take(tensor)
            if not self._wanted:
                raise _Enough


def _never(packed: None) -> torch.Tensor:
    raise RuntimeError("the graph of a block's second run is never run backward")


def _cuda_of(frame: Frame) -> torch.device | None:
    """The GPU that a block computes on, which need not be the current one, now or in backward."""
    tensors = (t for t in (*tree_leaves(frame.args), *frame.module.parameters()) if isinstance(t, torch.Tensor))
    return next((tensor.device for tensor in tensors if tensor.is_cuda), None)


def _generators(place: torch.device | None) -> list[Any]:
    """The states of the random generators that a block may draw from, Python's own among them."""
    ours = [random.getstate(), torch.get_rng_state()]
    return ours + ([torch.cuda.get_rng_state(place)] if place is not None else [])


@contextlib.contextmanager
def _random_as(states: list[Any], place: torch.device | None) -> Iterator[None]:
    """The random generators in these states inside, and as they were after."""
    now = _generators(place)
    _set_generators(states, place)
    try:
        yield
    finally:
        _set_generators(now, place)


def _set_generators(states: list[Any], place: torch.device | None) -> None:
    random.setstate(states[0])
    torch.set_rng_state(states[1])
    if place is not None:
        torch.cuda.set_rng_state(states[2], place)
