"""Saved storages of which a code is kept, and nothing else: a bit, a byte, or nothing for each element.

    at pack           compute: the storage ──▶ code; offloaded at once where the plan says so
    at first unpack   the node that asks must be one that the code is enough for
                      compute: code ──▶ a storage of the same form

Which codes there are, and which nodes they are enough for, say `vdnn.values.codes`; what the ops here cost, and the
memory that they take meanwhile, says `vdnn.analysis.encoding`: the two change together.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vdnn.engine.device import Buffer, Device, Event, Stream, byte_view
from vdnn.engine.remade import RemadeStorage
from vdnn.engine.storage import SavedStorage, typed
from vdnn.errors import EngineError
from vdnn.values.codes import READERS, Code, allows, exact

__all__ = ["EncodedStorage", "Windows", "windows_of"]

# Eight bools, read as one int64, times this have their bits side by side in the topmost byte, the first one lowest.
_GATHER = 0x0102040810204080
_BITS = ("sign", "positive", "bits")


@dataclass(frozen=True, slots=True)
class Windows:
    """Where the windows of a MaxPool2d lie in a plane, in elements: the first one's begin, and the steps to the next.

    `reach` is how far a window's last pixel is from its first: an index minus its window's begin is in 0 … reach.
    """

    begin: int
    rows: int
    columns: int
    row_step: int
    column_step: int
    reach: int

    def begins(self, device: torch.device) -> torch.Tensor:
        """Where each window begins, as [rows, columns] that lie in memory as one range."""
        last = self.begin + (self.rows - 1) * self.row_step + (self.columns - 1) * self.column_step
        flat = torch.arange(self.begin, last + 1, dtype=torch.int64, device=device)
        return flat.as_strided((self.rows, self.columns), (self.row_step, self.column_step))


def windows_of(module: nn.Module, taken: torch.Size | None, given: torch.Size) -> Windows | None:
    """The windows of a MaxPool2d that takes and gives these shapes; None if it is no such thing."""
    if type(module) is not nn.MaxPool2d or taken is None or len(taken) < 2 or taken[:-2] != given[:-2]:
        return None
    size, step, padding, dilation = map(_two, (module.kernel_size, module.stride, module.padding, module.dilation))
    for n, out, k, s, p, d in zip(taken[-2:], given[-2:], size, step, padding, dilation, strict=True):
        room = n + 2 * p - d * (k - 1) - 1
        windows = (room + (s - 1 if module.ceil_mode else 0)) // s + 1
        if module.ceil_mode and (windows - 1) * s >= n + p:
            windows -= 1
        if windows != out:
            return None
    width = taken[-1]
    return Windows(
        begin=-(padding[0] * width + padding[1]),
        rows=given[-2],
        columns=given[-1],
        row_step=step[0] * width,
        column_step=step[1],
        reach=(size[0] - 1) * dilation[0] * width + (size[1] - 1) * dilation[1],
    )


def _two(size: int | Sequence[int]) -> tuple[int, int]:
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes[0], sizes[-1]


class EncodedStorage(RemadeStorage):
    """One storage that its code stands for. Its owner makes every call under one lock.

    `windows` are those of the pool whose indices it holds.

    Raises:
        torch.OutOfMemoryError, DeviceOutOfMemory: no room for the code, or for what making it takes.
    """

    __slots__ = ("_alive", "_at", "_dtype", "_encoded", "_like", "_on", "_windows", "code", "how")

    def __init__(self, device: Device, source: torch.Tensor, how: Code, windows: Windows | None = None) -> None:
        super().__init__(device, source)
        storage = source.untyped_storage()
        self.how: Code = how
        self._alive = weakref.ref(storage)
        self._at = source._version
        self._dtype = source.dtype
        self._windows = windows
        self._like = (source.shape, source.stride())
        with torch.no_grad():
            code = self._encode(typed(byte_view(source.detach(), 0, self.nbytes), source.dtype))
        self.code = None if code is None else SavedStorage(device, code, 0, code.nbytes)
        self._on: Stream = device.current_stream()
        self._encoded: Event = device.record(self._on)

    @staticmethod
    def refusal(how: Code, tensor: torch.Tensor, windows: Windows | None) -> str:
        """Why this code cannot stand for the tensor's storage; "" if it can."""
        nbytes = tensor.untyped_storage().nbytes()
        if nbytes % tensor.element_size() or tensor.is_conj() or tensor.is_neg():
            return "its storage is no whole number of its elements, as they are"
        if how.startswith("index"):
            if windows is None:
                return "the windows of its pool are not known"
            if windows.reach >= 1 << _width(how):
                return f"a window of its pool reaches {windows.reach} elements far"
            if tensor.nbytes != nbytes or not _dense(tensor):
                return "its storage holds more than the pool's indices"
        return ""

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether this stands for the tensor's storage as it is now."""
        same = self._alive() is tensor.untyped_storage() and tensor._version == self._at
        return same and self.counts_as(tensor)

    def check_reader(self) -> None:
        """See that the code is enough for the autograd node that runs.

        Raises:
            EngineError: it is not, or nobody knows who asks.
        """
        if exact(self.how):
            return
        node = torch._C._current_autograd_node()
        name = "" if node is None else node.name()
        if not allows(self.how, name):
            raise EngineError(
                f"{name or 'something outside of backward'} asks for a saved tensor of which the plan keeps the code "
                f"{self.how!r} alone, enough for {', '.join(READERS[self.how] or ())}. The plan is for another model, "
                "or for another version of it: capture this model and plan again, or plan without codes"
            )

    def fetch(self, dtype: torch.dtype) -> tuple[torch.Tensor, int, int]:
        """As of every storage that is made again; the first time it is made from the code, which then goes."""
        if self._buffer is None:
            with torch.no_grad():
                self._hold(self._decode())
            self.code = None
        return super().fetch(dtype)

    def _encode(self, flat: torch.Tensor) -> torch.Tensor | None:
        if self.how == "shape":
            return None
        if self.how.startswith("index"):
            # the lowest bits of an index say which one of its window's it is, once the window is known
            narrow = torch.uint8 if _width(self.how) == 8 else torch.int16
            return torch.empty(flat.shape, dtype=narrow, device=flat.device).copy_(flat)
        n = flat.numel()
        make = torch.empty if n % 8 == 0 else torch.zeros  # what is behind the last element has no bits
        mask = make(-(-n // 8) * 8, dtype=torch.bool, device=flat.device)
        compare = {"sign": torch.le, "positive": torch.gt, "bits": torch.ne}[self.how]
        compare(flat, 0, out=mask[:n])
        words = mask.view(torch.int64).mul_(_GATHER)
        code = torch.empty(words.shape, dtype=torch.uint8, device=flat.device)
        torch.bitwise_right_shift(words, 56, out=code)
        return code.bitwise_not_() if self.how == "sign" else code

    def _decode(self) -> Buffer:
        device = self._device
        if self.code is None:
            return device.allocate(self.nbytes)  # nobody reads what is in it
        current = device.current_stream()
        if current != self._on:
            device.wait(current, self._encoded)
        narrow = torch.int16 if self.how == "index16" else torch.uint8
        flat, begin, _ = self.code.fetch(narrow)
        size = self.code.nbytes // narrow.itemsize
        code = flat.narrow(0, begin // narrow.itemsize, size)
        if self.how not in _BITS:
            return self._indices(code)
        item = self._dtype.itemsize
        values = torch.bitwise_left_shift(1, torch.arange(8, dtype=torch.uint8, device=code.device))
        buffer = device.allocate(8 * size * item)
        given = device.use(buffer)
        # a bit that is set gives some number from 1 to 128: positive, or true
        wide = given if self.how == "bits" else given.view(self._dtype)
        torch.bitwise_and(code.unsqueeze(1), values, out=wide.view(size, 8))
        if self.how == "bits":
            given.clamp_(max=1)
        return buffer

    def _indices(self, code: torch.Tensor) -> Buffer:
        assert self._windows is not None
        shape, stride = self._like
        begins = self._windows.begins(code.device)
        buffer = self._device.allocate(self.nbytes)
        indices = self._device.use(buffer).view(torch.int64).as_strided(shape, stride)
        torch.sub(code.as_strided(shape, stride, int(code.storage_offset())), begins, out=indices)
        indices.bitwise_and_((1 << _width(self.how)) - 1)
        indices.add_(begins)
        return buffer


def _width(how: Code) -> int:
    return 8 if how == "index8" else 16


def _dense(tensor: torch.Tensor) -> bool:
    """Whether its elements lie side by side, in whatever order, from the begin of its storage on."""
    run = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != run:
                return False
            run *= size
    return int(tensor.storage_offset()) == 0
