"""What the pack hook hands to autograd in a saved tensor's place.

Hooks switch off autograd's own check for in-place changes, so each object keeps the tensor's version counter
and checks it at unpack, as eager would. For an offloaded tensor the counter is kept by a probe, an alias of
the tensor whose data was emptied: it shares the counter and holds no memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vdnn.engine.schedule import Slot
from vdnn.engine.storage import SavedStorage

if TYPE_CHECKING:
    from vdnn.engine.offloader import Pass

__all__ = ["Kept", "Offloaded", "version_of"]

UNVERSIONED = -1


def version_of(tensor: torch.Tensor) -> int:
    """The tensor's version; inference tensors have none."""
    return UNVERSIONED if tensor.is_inference() else int(tensor._version)


def _changed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, now: int, then: int) -> RuntimeError:
    kind = torch.empty(0, dtype=dtype, device="meta").type().rsplit(".", 1)[-1]
    place = "torch.cuda." if device.type == "cuda" else "torch."
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{place}{kind} {list(shape)}] is at version {now}; expected version {then} instead. Hint: clone it before "
        "the in-place operation, or do that operation out of place."
    )


class Kept:
    """A saved tensor that stays on the device."""

    __slots__ = ("owner", "slot", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, owner: Pass | None, slot: Slot | None) -> None:
        self.tensor = tensor
        self.version = version_of(tensor)
        self.owner = owner
        self.slot = slot

    def restore(self) -> torch.Tensor:
        """The tensor itself.

        Raises:
            RuntimeError: it was changed in place since it was saved.
        """
        tensor = self.tensor
        if self.version != UNVERSIONED and tensor._version != self.version:
            raise _changed(tuple(tensor.shape), tensor.dtype, tensor.device, tensor._version, self.version)
        return tensor


class Offloaded:
    """A saved tensor whose storage is the engine's business."""

    __slots__ = ("device", "dtype", "offset_bytes", "owner", "probe", "shape", "slot", "storage", "stride", "version")

    def __init__(self, tensor: torch.Tensor, storage: SavedStorage, owner: Pass, slot: Slot | None) -> None:
        self.storage = storage
        self.owner = owner
        self.slot = slot
        self.dtype = tensor.dtype
        self.device = tensor.device
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.offset_bytes = tensor.storage_offset() * tensor.element_size()
        self.version = version_of(tensor)
        self.probe = tensor.detach()
        self.probe.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def restore(self) -> torch.Tensor:
        """The tensor, rebuilt over its storage with the offset, shape and stride that it had.

        Raises:
            RuntimeError: it was changed in place since it was saved.
        """
        if self.version != UNVERSIONED and self.probe._version != self.version:
            raise _changed(tuple(self.shape), self.dtype, self.device, self.probe._version, self.version)
        flat, begin = self.storage.fetch()
        offset = (begin + self.offset_bytes - self.storage.first) // self.dtype.itemsize
        with torch.no_grad():
            restored = torch.empty(0, dtype=self.dtype, device=self.device)
            restored.set_(flat.untyped_storage(), offset, self.shape, self.stride)
        return restored
