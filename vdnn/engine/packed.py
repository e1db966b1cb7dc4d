"""What the pack hook hands to autograd in a saved tensor's place.

Hooks switch off autograd's own check for in-place changes, so each object keeps the tensor's version counter
and checks it at unpack, as eager would.

    keep(t)      (t or an alias of it, version)   stays on the device, marks nothing: a pair, the cheapest there is
    Marked       the same, and the plan puts prefetches or waits at its unpack
    Offloaded    its storage is the engine's business, and keeps the counter: a storage stands for tensors of one
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vdnn.engine.recomputed import RecomputedStorage
from vdnn.engine.schedule import Slot
from vdnn.engine.storage import SavedStorage

if TYPE_CHECKING:
    from vdnn.engine.passes import Pass

__all__ = ["Kept", "Marked", "Offloaded", "keep", "restore_kept"]

Kept = tuple[torch.Tensor, int]


def keep(tensor: torch.Tensor) -> Kept:
    """A saved tensor that stays, with its version.

    A tensor with a node may be that node's own output: held as it is, the two would hold each other. A leaf has
    none; autograd holds leaves themselves, too.
    """
    if not tensor.is_leaf:
        tensor = tensor.detach()  # shares storage and version counter, not the graph
    return tensor, tensor._version


def restore_kept(kept: Kept) -> torch.Tensor:
    """The tensor itself.

    Raises:
        RuntimeError: it was changed in place since it was saved.
    """
    tensor, version = kept
    if tensor._version != version:
        raise _changed(tensor.shape, tensor.dtype, tensor.device, tensor._version, version)
    return tensor


class Marked:
    """A saved tensor that stays on the device and at whose unpack something happens."""

    __slots__ = ("kept", "owner", "slot")

    def __init__(self, tensor: torch.Tensor, owner: Pass, slot: Slot) -> None:
        self.kept = keep(tensor)
        self.owner = owner
        self.slot = slot


class Offloaded:
    """A saved tensor whose storage is the engine's business."""

    __slots__ = ("bits", "dtype", "offset_bytes", "owner", "shape", "slot", "storage", "stride", "version")

    def __init__(
        self, tensor: torch.Tensor, storage: SavedStorage | RecomputedStorage, owner: Pass, slot: Slot | None
    ) -> None:
        self.storage = storage
        self.owner = owner
        self.slot = slot
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.offset_bytes = tensor.storage_offset() * tensor.element_size()
        # what a tensor says of its bytes without changing them: read as conjugate, read as negative
        self.bits = (tensor.is_conj(), tensor.is_neg())
        self.version = tensor._version

    def restore(self) -> torch.Tensor:
        """The tensor, rebuilt over its storage with the offset, shape and stride that it had.

        Raises:
            RuntimeError: it was changed in place since it was saved, or its restored bytes were.
        """
        now = self.storage.probe._version
        if now == self.version:
            flat, first, changes = self.storage.fetch(self.dtype)
            if changes == 0:
                tensor = flat.as_strided(self.shape, self.stride, (first + self.offset_bytes) // self.dtype.itemsize)
                conjugate, negative = self.bits
                if conjugate:
                    tensor = torch._conj(tensor)
                return torch._neg_view(tensor) if negative else tensor
            now += changes
        raise _changed(self.shape, self.dtype, self.storage.probe.device, now, self.version)


def _changed(shape: torch.Size, dtype: torch.dtype, device: torch.device, now: int, then: int) -> RuntimeError:
    kind = torch.empty(0, dtype=dtype, device="meta").type().rsplit(".", 1)[-1]
    place = "torch.cuda." if device.type == "cuda" else "torch."
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{place}{kind} {list(shape)}] is at version {now}; expected version {then} instead. Hint: clone it before "
        "the in-place operation, or do that operation out of place."
    )
