"""`Plan`: what was decided for every storage that autograd saves.

A plan refers to program points that the engine can observe, never to clock times, and to saved tensors by
name: (module FQN, call number of that module in the step, n-th pack in that call). Written:

    pack   features.3#0/1     when that saved tensor is packed
    end    features.3#0       when that call of the module returns
    unpack features.3#0/1     when backward first asks for that saved tensor
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vdnn.errors import FormatError
from vdnn.values.codec import fingerprint, record, value
from vdnn.values.codes import CODES, ITEM_BYTES, Code, code_bytes, exact, fits

__all__ = [
    "OUTSIDE",
    "Action",
    "ConvChoice",
    "Copy",
    "Encode",
    "Entry",
    "Keep",
    "Offload",
    "Plan",
    "Point",
    "Recompute",
    "SavedName",
]

# The module FQN of tensors that are packed outside every module of the model, such as the loss's.
OUTSIDE = "<outside>"

_POINT = re.compile(r"(?P<kind>pack|end|unpack) (?P<module>\S*)#(?P<call>\d+)(?:/(?P<index>\d+))?")


@dataclass(frozen=True, slots=True)
class Point:
    """A moment of the step that the engine can observe; `index` is -1 for the end of a module call."""

    kind: Literal["pack", "end", "unpack"]
    module: str
    call: int
    index: int = -1

    def __str__(self) -> str:
        return f"{self.kind} {self.module}#{self.call}" + (f"/{self.index}" if self.index >= 0 else "")

    @staticmethod
    def parse(text: str) -> Point:
        """A point from its text.

        Raises:
            FormatError: not of the form `pack M#C/N`, `end M#C` or `unpack M#C/N`.
        """
        match = _POINT.fullmatch(text)
        if match is None or (match["kind"] == "end") is (match["index"] is not None):
            raise FormatError(f"{text!r} is not a point: write 'pack M#C/N', 'end M#C' or 'unpack M#C/N'")
        kind: Literal["pack", "end", "unpack"] = match["kind"]  # type: ignore[assignment]
        return Point(kind, match["module"], int(match["call"]), int(match["index"] or -1))


@record
@dataclass(frozen=True, slots=True)
class SavedName:
    """The name of a saved tensor, and what to check it by."""

    module: str
    call: int
    index: int
    dtype: str
    rank: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.module}#{self.call}/{self.index}"


@dataclass(frozen=True, slots=True)
class Keep:
    """The storage stays on the device; `why` says the reason."""

    why: str = ""
    action: Literal["keep"] = "keep"


@dataclass(frozen=True, slots=True)
class Offload:
    """The storage goes to pinned host memory and comes back.

    The copy out starts when the first of its saved tensors is packed. At `release_at` the compute stream
    waits for that copy and the engine lets go of the device memory. At `prefetch_at` the copy back starts;
    the compute stream waits for it when backward asks for the storage, or already at `wait_at`. Points are
    texts (`Point.parse`). "" as `prefetch_at` means on demand, "" as `wait_at` means at the unpack.
    With `whole` False each saved view is copied by itself, where they cover little of a large storage.
    """

    release_at: str
    prefetch_at: str = ""
    wait_at: str = ""
    whole: bool = True
    action: Literal["offload"] = "offload"


@dataclass(frozen=True, slots=True)
class Recompute:
    """The storage is dropped when forward lets go of it, and computed again when backward asks; `why` says the reason.

    `through` are the module calls that make it, "M#C" in their order, each from what the one before gives; the first
    takes the saved tensor `source`, "M#C/N". Or `block` is the call in which it is saved: the block runs once more
    from its input `source`, as far as it takes, and makes everything that the plan drops in it, with the random
    numbers it had; "" as the source of a block means that its input stays on the device for it. Without either it is
    made by whichever ops made it, which the simulator does and the engine not.
    """

    why: str = ""
    through: tuple[str, ...] = ()
    source: str = ""
    block: str = ""
    action: Literal["recompute"] = "recompute"


@dataclass(frozen=True, slots=True)
class Encode:
    """A code stands for the storage until backward asks; no gradient differs by a bit. `why` says the reason.

    The code (`vdnn.values.codes`) is made when the first of the saved tensors is packed, and the engine holds nothing
    else of the storage. At the first unpack a storage of the same form is made from it. With `release_at` the code
    itself is offloaded: it leaves and comes back at the three points as `Offload` says. "" keeps it on the device.
    """

    how: Code
    why: str = ""
    release_at: str = ""
    prefetch_at: str = ""
    wait_at: str = ""
    action: Literal["encode"] = "encode"


@dataclass(frozen=True, slots=True)
class Copy:
    """One saved tensor is copied to the host by itself, and each copy back gets a buffer of its own: what hooks do.

    `stream` "compute" puts the copies among the kernels; "side" on one stream for both ways, where a pack lets
    go of what was packed `stash` or more packs before (vdnn.analysis.tensorwise). The simulator does this, the engine
    does not.
    """

    stream: Literal["compute", "side"]
    stash: int = 0
    action: Literal["copy"] = "copy"


Action = Keep | Offload | Recompute | Encode | Copy


@dataclass(frozen=True, slots=True)
class Entry:
    """The action for one storage, known to the engine by the saved tensors that live in it.

    A plan of `Copy` actions has an entry for each saved tensor instead.
    """

    saved: tuple[SavedName, ...]
    storage_bytes: int
    action: Keep | Offload | Recompute | Encode | Copy

    @property
    def code_bytes(self) -> int | None:
        """Of a storage that is encoded the bytes of its code; None of any other."""
        if not isinstance(self.action, Encode):
            return None
        return code_bytes(self.action.how, self.storage_bytes // ITEM_BYTES[self.saved[0].dtype])

    @property
    def moved_bytes(self) -> int:
        """Bytes that leave the device: of the storage, of its views, or of its code."""
        action = self.action
        if isinstance(action, Offload):
            return self.storage_bytes if action.whole else sum(name.nbytes for name in self.saved)
        if isinstance(action, Encode):
            return (self.code_bytes or 0) if action.release_at else 0
        return sum(name.nbytes for name in self.saved) if isinstance(action, Copy) else 0


@record
@dataclass(frozen=True, slots=True)
class ConvChoice:
    """The algorithms of one call of a convolution, by the names of the plan's table."""

    module: str
    call: int
    forward: str
    backward: str


@value("plan", 1, changed="changed after it was made: what its notes said of it then is left out")
@dataclass(frozen=True, slots=True)
class Plan:
    """One action per saved storage, and a default for saved tensors that the plan has not seen.

    `default` is "keep" or "offload"; an offload by default takes tensors of at least `min_bytes`, and
    releases them oldest first once more than `max_inflight_bytes` are on their way.

    `workspace` says which convolution algorithms it is for: those of "least" workspace, the "fastest", or "mixed"
    by layer; "" leaves it to the library. With an `algorithm_table` it names them by layer in `convolutions`.
    """

    policy: str
    model: str
    batch: int
    device: str
    trace: str
    budget_bytes: int | None
    entries: tuple[Entry, ...]
    default: Literal["keep", "offload"] = "keep"
    min_bytes: int = 1 << 20
    max_inflight_bytes: int = 1 << 30
    notes: tuple[str, ...] = ()
    workspace: Literal["", "least", "fastest", "mixed"] = ""
    algorithm_table: str = ""
    convolutions: tuple[ConvChoice, ...] = ()

    @property
    def offloaded_bytes(self) -> int:
        """Bytes that leave the device in one step: whole storages, their codes, or each saved tensor by itself."""
        return sum(entry.moved_bytes for entry in self.entries)

    @property
    def copies(self) -> Copy | None:
        """How it copies, if it is a plan that copies saved tensor by saved tensor."""
        return next((entry.action for entry in self.entries if isinstance(entry.action, Copy)), None)

    def fingerprint(self) -> str:
        """Sixteen hex digits that equal plans share."""
        return fingerprint(self)

    def check(self) -> None:
        """Name the first thing that is wrong.

        Raises:
            FormatError: a saved tensor in two entries, a point of the wrong kind, a negative size.
        """
        seen: set[tuple[str, int, int]] = set()
        for entry in self.entries:
            if not entry.saved:
                raise FormatError("an entry names no saved tensor")
            for name in entry.saved:
                key = (name.module, name.call, name.index)
                if key in seen:
                    raise FormatError(f"saved tensor {name} is in two entries")
                seen.add(key)
            if isinstance(entry.action, Offload):
                _check_points(entry, entry.action)
            if isinstance(entry.action, Encode):
                _check_code(entry, entry.action)
            if isinstance(entry.action, Recompute):
                again = entry.action
                if bool(again.through) is not bool(again.source) and not again.block:
                    raise FormatError(f"{entry.saved[0]}: `through` and `source` say together how it is computed again")
                if again.through and again.block:
                    raise FormatError(
                        f"{entry.saved[0]} is computed again through single calls or by a block, not both"
                    )
                for text in (*again.through, again.block):
                    if text:
                        Point.parse(f"end {text}")
                if again.source and Point.parse(f"pack {again.source}").kind != "pack":
                    raise FormatError(f"{entry.saved[0]}: source {again.source!r} is no saved tensor")
        lossy = {
            str(name)
            for entry in self.entries
            if isinstance(entry.action, Encode) and not exact(entry.action.how)
            for name in entry.saved
        }
        for entry in self.entries:
            if isinstance(entry.action, Recompute) and entry.action.source in lossy:
                source = entry.action.source
                raise FormatError(f"{entry.saved[0]} comes again from {source}, of which only a code is kept")
        self._check_copies()
        _check_blocks(self.entries)
        if self.min_bytes < 0 or self.max_inflight_bytes < 0:
            raise FormatError("min_bytes and max_inflight_bytes must not be negative")

    def _check_copies(self) -> None:
        how = self.copies
        if how is None:
            return
        if how.stash < 0 or (how.stash > 0) is not (how.stream == "side"):
            raise FormatError(f"a stash of {how.stash} on the {how.stream} stream: it is 1 or more on a side stream")
        for entry in self.entries:
            if not isinstance(entry.action, Keep) and entry.action != how:
                raise FormatError(f"{entry.saved[0]}: a plan that copies every saved tensor does so in one way alone")
            if len(entry.saved) != 1:
                raise FormatError(f"{entry.saved[0]}: a plan that copies every saved tensor has an entry for each")


def _check_code(entry: Entry, action: Encode) -> None:
    name = entry.saved[0]
    if action.how not in CODES:
        raise FormatError(f"{name}: there is no code {action.how!r}; there are {', '.join(CODES)}")
    dtypes = {saved.dtype for saved in entry.saved}
    if len(dtypes) > 1 or not fits(action.how, name.dtype):
        raise FormatError(f"{name}: the code {action.how!r} is not for {', '.join(sorted(dtypes))}")
    if not action.release_at:
        if action.prefetch_at or action.wait_at:
            raise FormatError(f"{name}: its code comes back, but never leaves: give release_at, too")
    elif action.how == "shape":
        raise FormatError(f"{name}: nothing is kept of it, so there is nothing to offload")
    else:
        _check_points(entry, action)


def _check_points(entry: Entry, action: Offload | Encode) -> None:
    if Point.parse(action.release_at).kind == "unpack":
        raise FormatError(f"{entry.saved[0]}: release_at {action.release_at!r} is not in forward")
    for text in (action.prefetch_at, action.wait_at):
        if text and Point.parse(text).kind != "unpack":
            raise FormatError(f"{entry.saved[0]}: {text!r} is not in backward")


def _check_blocks(entries: Sequence[Entry]) -> None:
    """A block is computed again as a whole: nothing that a plan computes again may lie inside another's block."""
    again = [(entry, entry.action) for entry in entries if isinstance(entry.action, Recompute)]
    blocks = {action.block: Point.parse(f"end {action.block}").module for _, action in again if action.block}
    dropped = {str(name) for entry, _ in again for name in entry.saved}
    sources = {action.block: action.source for _, action in again if action.block}
    for entry, action in again:
        for text in (*action.through, action.block):
            inner = Point.parse(f"end {text}").module if text else ""
            for block, outer in blocks.items():
                if text in blocks and inner == outer:
                    continue  # two calls of one module, one after the other
                if text and text != block and (inner + ".").startswith(outer + "."):
                    raise FormatError(f"{text} is computed again inside {block}, which is, too: name one of them")
        if not action.block:
            continue
        for name in entry.saved:
            if not (name.module + ".").startswith(blocks[action.block] + "."):
                raise FormatError(f"{name} is not saved inside {action.block}, which is to make it again")
        if action.source != sources[action.block]:
            raise FormatError(
                f"{action.block} starts from {action.source} and from {sources[action.block]}: from which?"
            )
        if action.source in dropped:
            raise FormatError(f"{action.block} starts from {action.source}, which is computed again itself")
