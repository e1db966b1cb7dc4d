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

from vdnn.engine.device import Form
from vdnn.engine.remade import RemadeStorage
from vdnn.engine.schedule import Slot
from vdnn.engine.storage import SavedStorage, form_of

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
    """A saved tensor whose storage is the engine's business.

    `view` says how it lies there, where that is not the storage's own form: form, first byte, and what it says of its
    bytes without changing them (that they are to be read as conjugate, as negative).
    """

    __slots__ = ("owner", "slot", "storage", "version", "view")

    def __init__(
        self, tensor: torch.Tensor, storage: SavedStorage | RemadeStorage, owner: Pass, slot: Slot | None
    ) -> None:
        self.storage = storage
        self.owner = owner
        self.slot = slot
        self.version = tensor._version
        form = storage.form
        self.view: tuple[Form, int, bool, bool] | None = None
        if form is not None and storage.fresh:
            storage.fresh = False  # it was made of this very tensor
        elif form is None or form_of(tensor, storage.nbytes) != form:
            own = Form(tensor.shape, tensor.stride(), tensor.dtype)
            first = int(tensor.storage_offset()) * own.dtype.itemsize
            self.view = (own, first, tensor.is_conj(), tensor.is_neg())

    def restore(self) -> torch.Tensor:
        """The tensor, rebuilt over its storage with the offset, shape and stride that it had.

        Raises:
            RuntimeError: it was changed in place since it was saved, or its restored bytes were.
        """
        storage, view = self.storage, self.view
        form = storage.form if view is None else view[0]
        assert form is not None
        now = storage.probe._version
        if now == self.version:
            found, begin, changes = storage.fetch(form.dtype)
            if changes == 0:
                if view is None:
                    return found
                _, first, conjugate, negative = view
                tensor = found.as_strided(form.shape, form.stride, (begin + first) // form.dtype.itemsize)
                if conjugate:
                    tensor = torch._conj(tensor)
                return torch._neg_view(tensor) if negative else tensor
            now += changes
        raise _changed(form.shape, form.dtype, storage.probe.device, now, self.version)


def _changed(shape: torch.Size, dtype: torch.dtype, device: torch.device, now: int, then: int) -> RuntimeError:
    kind = torch.empty(0, dtype=dtype, device="meta").type().rsplit(".", 1)[-1]
    place = "torch.cuda." if device.type == "cuda" else "torch."
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{place}{kind} {list(shape)}] is at version {now}; expected version {then} instead. Hint: clone it before "
        "the in-place operation, or do that operation out of place."
    )
