"""An account of a virtual device's memory, with an out-of-memory of its own.

Watches every op (a dispatch mode), counts the storages it sees, and asks the storages themselves whether
they still live (a C-level weak reference), not Python's finalizers: so it is independent of the tracker,
and the two can check each other. Asking every storage at every op would be slow; the sum of what was seen
is an upper bound, so only when that bound would set a new peak, or break the limit, are the dead swept out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vdnn.errors import DeviceOutOfMemory
from vdnn.units import format_bytes

__all__ = ["MemoryAccount"]


class MemoryAccount(TorchDispatchMode):
    """Bytes in storages that ops on CPU tensors have touched and that are still alive.

    Args:
        limit_bytes: what the device has; None for no limit.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit_bytes = limit_bytes
        self.peak_bytes = 0
        self._seen_bytes = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._foreign: dict[int, StorageWeakRef] = {}

    def exclude(self, tensor: torch.Tensor) -> None:
        """Do not count this tensor's storage: it plays host memory."""
        storage = tensor.untyped_storage()
        self._foreign[storage._cdata] = StorageWeakRef(storage)

    def add(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage from now on.

        Raises:
            DeviceOutOfMemory: what lives is more than the limit; says by how much.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        # A weak reference keeps the address of a dead storage from being used again: a key seen is the same storage.
        known = self._seen.get(key)
        if known is not None:
            grown = storage.nbytes() - known[1]
            if grown == 0:
                return
            self._seen[key] = (known[0], storage.nbytes())
        elif key in self._foreign:
            return
        else:
            grown = storage.nbytes()
            self._seen[key] = (StorageWeakRef(storage), grown)
        self._seen_bytes += grown
        if self._seen_bytes > self.peak_bytes:
            live = self.live_bytes()
            if self.limit_bytes is not None and live > self.limit_bytes:
                # the storage will be gone as soon as the op has failed, but not before
                raise DeviceOutOfMemory(
                    f"virtual device out of memory: {format_bytes(grown)} more make {format_bytes(live)} of "
                    f"{format_bytes(self.limit_bytes)}; offload more, take a smaller batch, or give it more memory"
                )
            self.peak_bytes = max(self.peak_bytes, live)

    def live_bytes(self) -> int:
        """Bytes alive now, exactly."""
        for key in [key for key, (weak, _) in self._seen.items() if weak.expired()]:
            self._seen_bytes -= self._seen.pop(key)[1]
        for key in [key for key, weak in self._foreign.items() if weak.expired()]:
            del self._foreign[key]
        return self._seen_bytes

    def reset_peak(self) -> None:
        """Start a new peak from what is alive now."""
        self.peak_bytes = self.live_bytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in tree_iter((args, kwargs, out)):
            if isinstance(item, torch.Tensor) and item.device.type == "cpu" and item.layout is torch.strided:
                self.add(item)
        return out
