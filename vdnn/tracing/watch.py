"""What a capture watches while the step runs: module calls, what autograd saves and asks back, backward's nodes.

The pack hook hands out a stand-in that does not hold the tensor, so the trace sees when forward itself lets go
of a storage; at unpack all stand-ins of one storage come back as views of one new fake storage, so the trace
sees when backward lets go of it. Nodes are known by their sequence numbers: a tensor is packed for the node
that was made last.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vdnn.calls import Frame
from vdnn.errors import CaptureError
from vdnn.tracing.hooks import NotedHooks
from vdnn.tracing.layers import layer_kind
from vdnn.tracing.recorder import Recorder
from vdnn.tracing.shortcuts import fake_view
from vdnn.tracing.walk import Backward

__all__ = ["Packed", "Watch"]

Form = tuple[str, tuple[int, ...], tuple[int, ...], int, int]  # dtype, shape, stride, offset, bytes
_ACCUMULATE = 2**62  # AccumulateGrad has the largest sequence number


class Packed:
    """One saved tensor, as long as the step runs. `released` is where autograd let go of it."""

    __slots__ = ("form", "index", "module", "node", "packed_at", "released", "store", "unpacked_at")

    def __init__(self, module: int, index: int, store: int, form: Form, packed_at: int) -> None:
        self.module = module
        self.index = index
        self.store = store
        self.form = form
        self.packed_at = packed_at
        self.unpacked_at: list[int] = []
        self.node = ""
        self.released: int | None = None


class _StandIn:
    """What the pack hook hands to autograd: where the tensor is, not the tensor."""

    __slots__ = ("__weakref__", "dtype", "offset", "place", "saved", "shape", "store", "stride")

    def __init__(self, store: int, saved: int, tensor: torch.Tensor) -> None:
        self.store = store
        self.saved = saved
        self.dtype = tensor.dtype
        self.place = tensor.device
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()


class _Direct:
    """A tensor that lives outside the step anyway (a parameter, a buffer, another device's)."""

    __slots__ = ("saved", "tensor")

    def __init__(self, saved: int, tensor: torch.Tensor) -> None:
        self.saved = saved
        self.tensor = tensor


class Watch:
    """One capture in progress."""

    def __init__(
        self, model: nn.Module, device: str, mode: FakeTensorMode, rules: dict[Any, Any], as_cuda: bool = False
    ) -> None:
        """`as_cuda`: of a step on a GPU, whose kernels copy and whose engine adds gradients in place."""
        self.mode = mode
        self.model = model
        self.device = device  # of the fake tensors
        self.recurrent = False
        self.recorder = Recorder(device, rules, mode, as_cuda)
        self.calls: list[list[Any]] = []
        self.saved: list[Packed] = []
        self.standins: list[weakref.ref[_StandIn] | None] = []
        self.packs_of: dict[int, list[int]] = {}  # a node's sequence number → what was packed for it
        self.asked: list[int] = []  # saved tensors that the node which runs has asked for
        self.last = -1  # the last sequence number of forward
        self.hooks = NotedHooks()
        self.walk = Backward(self.hooks, self._on_node, self._on_done, self._on_grad, self.unseen, as_cuda)
        self.changes: list[tuple[int, int]] = [(-1, -1)]  # (autograd sequence number, module call from there on)
        self.outside = 0
        self.node = ""
        self._numbers: list[int] = []
        self.broken: Frame | None = None
        self.frame: Frame | None = None
        self.fixed: set[int] = set()

    # -- module calls ------------------------------------------------------------------------------

    def begin(self, frame: Frame) -> None:
        rec = self.recorder
        parent = frame.parent.slot if frame.parent is not None else -1
        frame.slot = len(self.calls)
        kind = layer_kind(frame.module)
        self.calls.append([frame.fqn, frame.call, type(frame.module).__name__, kind, parent, len(rec.ops), -1, -1, -1])
        self._enter(frame)

    def end(self, frame: Frame) -> None:
        if self.broken is None and sys.exc_info()[0] is not None:
            self.broken = frame  # forward raised in there
        self.calls[frame.slot][6] = len(self.recorder.ops)
        self._enter(frame.parent)

    def _enter(self, frame: Frame | None) -> None:
        self.frame = frame
        self.recorder.module = frame.slot if frame is not None else -1
        self.changes.append((torch.autograd._get_sequence_nr(), self.recorder.module))  # type: ignore[attr-defined]

    # -- saved tensors -----------------------------------------------------------------------------

    def pack(self, tensor: torch.Tensor) -> Any:
        rec, frame = self.recorder, self.frame
        if tensor.device.type != self.device or tensor.layout is not torch.strided:
            self._count(frame)
            return _Direct(-1, tensor)
        number = rec.store_of(tensor)
        store = rec.stores[number]
        store.packed = True
        if frame is not None and not store.name and rec.ops and rec.ops[-1].phase == "forward":
            self._name_cast(store, tensor, frame)
        form = (
            str(tensor.dtype).removeprefix("torch."),
            tuple(map(int, tensor.shape)),
            tuple(map(int, tensor.stride())),
            int(tensor.storage_offset()),
            tensor.numel() * tensor.element_size(),
        )
        index = self._count(frame)
        number_of_pack = len(self.saved)
        packed = Packed(frame.slot if frame is not None else -1, index, number, form, len(rec.ops))
        self.saved.append(packed)
        sequence = torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
        self.packs_of.setdefault(sequence, []).append(number_of_pack)
        if tensor.untyped_storage()._cdata in self.fixed:
            self.standins.append(None)
            return _Direct(number_of_pack, tensor)
        standin = _StandIn(number, number_of_pack, tensor)

        def dropped(_: object) -> None:
            if packed.released is None:
                packed.released = len(rec.ops)

        self.standins.append(weakref.ref(standin, dropped))
        return standin

    def _count(self, frame: Frame | None) -> int:
        if frame is None:
            self.outside += 1
            return self.outside - 1
        frame.packs += 1
        return frame.packs - 1

    def _name_cast(self, store: Any, tensor: torch.Tensor, frame: Frame) -> None:
        """Autocast's low-precision copies of weights: recognisable, so that no policy moves them."""
        for name, parameter in frame.module._parameters.items():
            if parameter is not None and parameter.dtype != tensor.dtype and parameter.numel() == tensor.numel():
                store.name = f"cast of {frame.fqn + '.' if frame.fqn else ''}{name}"
                return

    def unpack(self, packed: Any) -> torch.Tensor:
        rec = self.recorder
        if packed.saved >= 0:
            self.saved[packed.saved].unpacked_at.append(len(rec.ops))
            self.saved[packed.saved].node = self.node
            self.asked.append(packed.saved)
        if isinstance(packed, _Direct):
            return packed.tensor
        store = rec.stores[packed.store]
        if store.need < 0:
            store.need = len(rec.ops)
        storage = store.ref()
        if storage is not None:
            if rec.phase == "backward":
                store.held = store.held or "output"
        elif store.restored is not None:
            storage = store.restored()
        if storage is None:
            made = fake_view(
                self.mode, store.nbytes, packed.place, packed.dtype, packed.offset, packed.shape, packed.stride
            )
            rec.alias(made.untyped_storage(), packed.store)
            return made
        return fake_view(self.mode, storage, packed.place, packed.dtype, packed.offset, packed.shape, packed.stride)

    # -- backward ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """The capture's own ops are not part of the step."""
        before, self.recorder.active = self.recorder.active, False
        try:
            yield
        finally:
            self.recorder.active = before

    def backward(self, loss: torch.Tensor) -> None:
        self.recorder.phase = "backward"
        self.last = torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
        self._numbers = [number for number, _ in self.changes]
        self.walk.of(loss)
        self.recorder.module, self.recorder.node = -1, ""

    def _module_name(self) -> str:
        number = self.recorder.module
        return f"{self.calls[number][0] or '<model>'} ({self.calls[number][2]})" if number >= 0 else "<outside>"

    def _on_node(self, node: Any) -> None:
        sequence = int(node._sequence_nr())
        self.asked.clear()
        if self.recorder.phase == "forward":
            return
        # AccumulateGrad, and what backward itself made, stay with the node before them
        if sequence < _ACCUMULATE and sequence <= self.last:
            self.node = self.recorder.node = str(node.name())
            self.recorder.module = self.changes[bisect_right(self._numbers, sequence) - 1][1]

    def _on_done(self, node: Any) -> None:
        if self.recorder.phase == "forward":
            return
        # what it asked for is its own; what it did not ask for was packed when it was the newest node
        for number in (*self.packs_of.get(int(node._sequence_nr()), ()), *self.asked):
            packed = self.saved[number]
            packed.node = str(node.name())
            if packed.released is None:
                packed.released = len(self.recorder.ops)

    def _on_grad(self, grad: torch.Tensor) -> None:
        if grad.layout is not torch.strided:
            raise CaptureError(
                f"{self.node} in module {self._module_name()} gives a gradient of layout {grad.layout}: a capture "
                "knows dense gradients only (build the embedding with sparse=False)"
            )
        if grad.device.type == self.device:
            store = self.recorder.stores[self.recorder.store_of(grad)]
            if not store.packed:
                store.category = store.category or "gradient"
