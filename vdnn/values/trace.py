"""`Trace`: what one training step of a model does, without saying on which GPU or how fast.

The step is a list of ops in the order the host issues them: forward (with the loss), backward, optimizer.
A *position* p in 0 … len(ops) is the moment before op p and after op p-1. Memory is told in positions:

    storage s is live during op i   if and only if   s.alloc <= i < s.free

`alloc` is the op that makes it (-1: it was there before the step), `free` the first position at which
nobody holds it (len(ops): it outlives the step). Between lie, for storages that autograd saves:

    alloc … first pack … release …………… need … last unpack … free
                         │                │
                         │                └ first position at which backward asks for it
                         └ first position at which nothing but autograd holds it

so a storage offloaded and released at position r >= release, and fetched at p <= need, occupies the device
in [alloc, r) and [p, free) only.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

from vdnn.errors import FormatError
from vdnn.values.codec import fingerprint, record, value
from vdnn.values.recipe import USUAL, Recipe

__all__ = ["Category", "Kernel", "LayerKind", "ModuleCall", "Op", "Phase", "SavedTensor", "Storage", "Trace"]

Phase = Literal["forward", "backward", "optimizer"]
Category = Literal["parameter", "buffer", "input", "activation", "gradient", "optimizer_state", "temporary"]
Kernel = Literal[
    "conv",
    "matmul",
    "attention",
    "norm",
    "pool",
    "elementwise",
    "reduce",
    "copy",
    "embedding",
    "rnn",
    "view",
    "other",
]
LayerKind = Literal[
    "conv",
    "pool",
    "activation",
    "norm",
    "linear",
    "dropout",
    "embedding",
    "attention",
    "rnn",
    "container",
    "other",
]


@record
@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of one module in the step.

    `fqn` is "" for the model itself; `call` counts the calls of that module from 0; `parent` indexes
    `Trace.modules` (-1: none). Positions are half-open ranges; (-1, -1) for a call without backward ops.
    """

    fqn: str
    call: int
    type: str
    kind: LayerKind
    parent: int
    forward_begin: int
    forward_end: int
    backward_begin: int
    backward_end: int

    def __str__(self) -> str:
        return f"{self.fqn or '<model>'}#{self.call}"


@record
@dataclass(frozen=True, slots=True)
class Storage:
    """One piece of device memory; tensors are views of it.

    `name` is the parameter's or buffer's FQN, else "". `need` is -1 for a storage that autograd does not save.
    `held` names whoever else holds it until backward asks ("output", …): offloading it would free nothing.
    """

    nbytes: int
    category: Category
    name: str
    alloc: int
    release: int
    need: int
    free: int
    held: str


@record
@dataclass(frozen=True, slots=True)
class Op:
    """One operation as the host issues it.

    `kernel` is its class and `dims` its sizes: conv (batch, in channels, out channels, groups, out pixels,
    kernel pixels, in pixels, and 1 where its tensors have channels last); matmul (batch, m, n, k); attention (batch,
    heads, queries, keys, head size); norm (elements, row length or, of a batch norm, channels); pool (elements,
    pixels of the window, 0: adaptive; of max_pool2d_with_indices then how far a window's last pixel is from its
    first, and the last window from the first);
    reduce (elements, results, stride of the dimension that is reduced), a softmax (elements, row length, stride);
    elementwise, copy and the rest (elements, how many of them lie side by side in all tensors, how many tensors
    are broadcast; then of an interpolation that goes over the planes of images one by one, how many). A `view` runs no
    kernel. `flops` counts a multiply-add as two. `module` indexes `Trace.modules` (-1: outside the model, such as the
    loss). `reads` and `writes` index `Trace.storages`.
    """

    name: str
    phase: Phase
    module: int
    kernel: Kernel
    dtype: str
    dims: tuple[int, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    flops: int
    read_bytes: int
    written_bytes: int
    workspace_bytes: int


@record
@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One tensor that autograd packed, in pack order.

    It is named by its module call, and its number `index` among the packs of that call (packs of modules
    called inside count for those). Shape, stride and offset are in elements. `packed_at` and `unpacked_at`
    are positions. `node` is the autograd node that saved it.
    """

    module: int
    index: int
    storage: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int
    packed_at: int
    unpacked_at: tuple[int, ...]
    node: str


@value("trace", 1)
@dataclass(frozen=True, slots=True)
class Trace:
    """One training step. `device` is the kind of device whose step this is: "cuda" or "cpu".

    `corrections` says in words where the capture could not watch and what was put in its place; `recipe` how the step
    is run.
    """

    model: str
    batch: int
    precision: str
    optimizer: str
    device: str
    channels_last: bool
    options: tuple[tuple[str, str], ...]
    torch: str
    corrections: tuple[str, ...]
    modules: tuple[ModuleCall, ...]
    storages: tuple[Storage, ...]
    ops: tuple[Op, ...]
    saved: tuple[SavedTensor, ...]
    recipe: Recipe = USUAL

    @property
    def forward_end(self) -> int:
        """Position of the first op that is not forward."""
        return bisect_left(self.ops, 1, key=lambda op: op.phase != "forward")

    @property
    def backward_end(self) -> int:
        """Position of the first optimizer op."""
        return bisect_left(self.ops, 1, key=lambda op: op.phase == "optimizer")

    def fingerprint(self) -> str:
        """Sixteen hex digits that equal traces share."""
        return fingerprint(self)

    def module_name(self, index: int) -> str:
        """The module call's name for people: "features.3#0", or "<outside>" for -1."""
        return str(self.modules[index]) if index >= 0 else "<outside>"

    def check(self) -> None:
        """Name the first thing that is wrong.

        Raises:
            FormatError: an index is out of range, or positions are out of order.
        """
        n = len(self.ops)
        for i, call in enumerate(self.modules):
            if not -1 <= call.parent < i:
                raise FormatError(f"module call {i} ({call}) has parent {call.parent}, not an earlier call")
            if not 0 <= call.forward_begin <= call.forward_end <= n:
                raise FormatError(
                    f"module call {i} ({call}) runs forward from {call.forward_begin} to {call.forward_end} of {n} ops"
                )
            if not (
                call.backward_begin == call.backward_end == -1 or 0 <= call.backward_begin <= call.backward_end <= n
            ):
                raise FormatError(
                    f"module call {i} ({call}) runs backward from {call.backward_begin} to {call.backward_end}"
                )
        order = {"forward": 0, "backward": 1, "optimizer": 2}
        latest = 0
        for i, op in enumerate(self.ops):
            if order[op.phase] < latest:
                raise FormatError(f"op {i} ({op.name}) is {op.phase} after a later phase")
            latest = order[op.phase]
            if not -1 <= op.module < len(self.modules):
                raise FormatError(f"op {i} ({op.name}) is of module call {op.module} of {len(self.modules)}")
            if min(op.flops, op.read_bytes, op.written_bytes, op.workspace_bytes) < 0:
                raise FormatError(f"op {i} ({op.name}) has a negative size")
            for touched in op.reads + op.writes:
                if not 0 <= touched < len(self.storages):
                    raise FormatError(f"op {i} ({op.name}) touches storage {touched} of {len(self.storages)}")
                if not self.storages[touched].alloc <= i < self.storages[touched].free:
                    raise FormatError(f"op {i} ({op.name}) touches storage {touched}, which is not live there")
        saved_storages = {t.storage for t in self.saved}
        for i, s in enumerate(self.storages):
            if s.nbytes < 0 or not -1 <= s.alloc < n + 1 or not s.alloc < s.free <= n or s.release > s.free:
                raise FormatError(
                    f"storage {i} has {s.nbytes} bytes from op {s.alloc} to {s.free} (released at {s.release}) of {n}"
                )
            if s.need >= 0 and i not in saved_storages:
                raise FormatError(f"storage {i} is needed at {s.need}, but no saved tensor is in it")
        for i, t in enumerate(self.saved):
            if not 0 <= t.storage < len(self.storages) or not -1 <= t.module < len(self.modules):
                raise FormatError(f"saved tensor {i} is of storage {t.storage}, module call {t.module}")
            if not 0 <= t.packed_at <= n or any(not t.packed_at <= u <= n for u in t.unpacked_at):
                raise FormatError(f"saved tensor {i} is packed at {t.packed_at} and unpacked at {t.unpacked_at}")
