"""`track`: what fills the memory of a training step, op by op, on any device.

    with track(model, optimizer) as memory:
        for batch in data:
            memory.reset_peak()               # optional: look at this step only
            train_step(batch)
    result = memory.result()                  # peak, where it is, what fills it, every event

It counts storages, not tensors: a dispatch mode sees the inputs and outputs of every op, and a weak
reference to each storage's Python object, which lives exactly as long as the storage, tells when the memory
goes (`ledger`). That gives *requested* bytes, exact after every op. What a kernel takes and gives back inside one op
(workspace) is not seen; on CUDA the allocator's own peaks, which have it, stand beside.

What a storage is for (its category) is known only later: what forward made is an activation if it is alive
when backward starts; what backward made is a gradient if it outlives the autograd node that made it.

Host memory of the engine is not the device's, even where both are CPU memory: the engine marks it with
`mark_as_host`, and `Tracker.ignore` leaves out anything else.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter
from contextlib import ExitStack
from types import TracebackType
from typing import Any, cast

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vdnn.calls import Frame, ModuleCalls
from vdnn.errors import UsageError
from vdnn.ledger import Block, Ledger, Where, is_host, notes, place, storages_of
from vdnn.values.result import Provenance, RunResult
from vdnn.values.trace import Category, Phase

__all__ = ["Tracker", "track"]

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def track(
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    *,
    device: str | torch.device | None = None,
) -> Tracker:
    """A memory tracker, to be entered with `with`.

    Args:
        model: names modules, and tells parameters and buffers; without it, parameters are known by their type.
        optimizer: tells the states that are there already; those made inside are found without it.
        device: whose memory; by default the model's, or CUDA where it is in use, or else the CPU.
    """
    return Tracker(model, optimizer, device)


class Tracker(TorchDispatchMode):
    """Counts the storages of one device type while it is entered; once. See `track`."""

    supports_higher_order_operators = True
    _entered: list[Tracker] = []  # noqa: RUF012  trackers inside one another share the allocator's peaks

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = torch.device(device) if device is not None else _device_of(model, optimizer)
        self.precision = ""
        self._model = model
        self._name = type(model).__name__ if model is not None else ""
        self._optimizer = optimizer
        self._calls: ModuleCalls | None = None
        self._cleanup: ExitStack | None = None
        self._used = False
        self._lock = threading.RLock()
        self._ledger = Ledger()
        self._young: list[Block] = []  # made by the autograd node that is running
        self._node: object = None
        self._task = -1
        self._stepping: tuple[int, int] | None = None  # optimizer inside its step, and the backward it runs in
        self._sequence: list[int] = []  # autograd nodes numbered from here on …
        self._owner: list[str] = []  # … are made in this module
        self._cuda_peaks: tuple[int, int, int] | None = None

    # -- context -----------------------------------------------------------------------------------

    def __enter__(self) -> Tracker:
        """Begin to count; what model and optimizer hold already is resident.

        Raises:
            UsageError: it was entered before.
        """
        if self._used:
            raise UsageError("a tracker counts one stretch of work: call vdnn.track() again for another")
        self._used = True
        with ExitStack() as stack:
            if self._model is not None:
                self._adopt_model(self._model)
                self._calls = ModuleCalls(self._model, self._frame_begins, self._frame_ends)
                stack.callback(self._calls.detach)
                self._calls.attach()
            if self._optimizer is not None:
                self._adopt_optimizer(self._optimizer)
            stack.callback(register_optimizer_step_pre_hook(self._step_begins).remove)
            stack.callback(register_optimizer_step_post_hook(self._step_ends).remove)
            self._entered.append(self)
            stack.callback(self._entered.remove, self)
            self.reset_peak()
            super().__enter__()  # type: ignore[no-untyped-call]
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        with self._lock:
            self._read_cuda_peaks()
            self._leave_node()
            self._ledger.close()
            if self._cleanup is not None:
                self._cleanup.close()
            self._model = self._optimizer = self._calls = self._cleanup = self._stepping = None

    # -- what the user asks ------------------------------------------------------------------------

    @property
    def live_bytes(self) -> int:
        """Requested bytes alive now; after the block, at its end."""
        with self._lock:
            self._ledger.drain()
            return self._ledger.live_bytes

    @property
    def peak_bytes(self) -> int:
        """Most requested bytes alive after any op since `reset_peak`."""
        return self._ledger.peak_bytes

    def live_by_category(self) -> dict[Category, int]:
        """What is alive now, by what it is for, as far as is known by now."""
        with self._lock:
            self._ledger.drain()
            sums: Counter[Category] = Counter()
            for block in self._ledger.blocks():
                if block.nbytes:
                    sums[block.category] += block.nbytes
            return dict(sums)

    def reset_peak(self) -> None:
        """Look at what follows only: events and peaks begin anew, what is alive is resident."""
        with self._lock:
            self._ledger.open_window()
            # one number pair for each module call: enough for any step, not for a whole training
            del self._sequence[:-100_000], self._owner[:-100_000]
            if self.device.type == "cuda" and torch.cuda.is_available():
                for other in self._entered:
                    if other is not self:
                        other._read_cuda_peaks()
                self._cuda_peaks = None
                torch.cuda.reset_peak_memory_stats(self.device)

    def ignore(self, tensor: torch.Tensor | torch.UntypedStorage) -> None:
        """Do not count this memory, neither what it has been so far in `live_bytes`, nor from now on."""
        storage = tensor if isinstance(tensor, torch.UntypedStorage) else tensor.untyped_storage()
        with self._lock:
            block = self._ledger.find(storage)
            if block is None:
                block = self._ledger.open(storage, Block("temporary", "", "forward", True))
            else:
                self._ledger.resize(block, 0, None)
            block.alive = False

    def result(
        self,
        *,
        model: str = "",
        batch: int = 0,
        gpu: str = "",
        policy: str = "",
        precision: str = "",
        trace: str = "",
        plan: str = "",
        timeline: bool = True,
    ) -> RunResult:
        """The numbers since the last `reset_peak`, as a measured run.

        Times are None: a tracked step is slower than the step. So are the allocator's peaks, except on CUDA.
        """
        with self._lock:
            self._read_cuda_peaks()
            self._ledger.drain()
            items = self._ledger.peak_items()
            where = self._ledger.peak_where()
            cuda = self._cuda_peaks
            name = torch.cuda.get_device_name(self.device) if cuda is not None else self.device.type
            return RunResult(
                source="measured",
                model=model or self._name,
                batch=batch,
                gpu=gpu or name,
                policy=policy,
                precision=precision or self.precision,
                trace=trace,
                plan=plan,
                peak_requested_bytes=self._ledger.peak_bytes,
                peak_allocated_bytes=None if cuda is None else cuda[0],
                peak_reserved_bytes=None if cuda is None else cuda[1],
                peak_at=place(where),
                peak_items=items,
                notes=notes(items, self._ledger.peak_bytes, None if cuda is None else cuda[2]),
                timeline=self._ledger.timeline() if timeline else None,
                provenance=Provenance(torch=str(torch.__version__), cuda=torch.version.cuda or "", device=name),
            )

    # -- every op ----------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        with self._lock:
            self._ledger.drain()
            phase = self._enter_phase()
            module: str | None = None
            for made, values in ((False, (args, kwargs)), (True, out)):
                for tensor in tree_iter(values):
                    if not isinstance(tensor, torch.Tensor) or tensor.device.type != self.device.type:
                        continue
                    for storage in storages_of(tensor):
                        block = self._ledger.find(storage)
                        if block is None:
                            module = self._module(phase) if module is None else module
                            self._meet(storage, tensor, made, (phase, module, func))
                        elif block.alive and block.nbytes != storage.nbytes():
                            self._ledger.resize(block, storage.nbytes(), (phase, block.module, func))
            self._ledger.position += 1
        return out

    def _meet(self, storage: torch.UntypedStorage, tensor: torch.Tensor, made: bool, where: Where) -> None:
        """See a storage for the first time: an op has made it, or it was there."""
        phase, module, func = where
        block = Block("temporary", module, phase, False)
        self._ledger.open(storage, block)
        if is_host(storage):
            block.alive = False
            return
        if isinstance(tensor, nn.Parameter):
            block.category, block.module, block.settled = "parameter", "", True
        elif not made and phase == "forward":
            block.category, block.module, block.settled = "input", "", True
        elif phase == "backward":
            # Backward computes gradients without grad mode. What has it is a forward run again (checkpoint);
            # what is of integers is no gradient either, but masks, or bytes that an engine brings back.
            block.recomputed = torch.is_grad_enabled() or not (tensor.is_floating_point() or tensor.is_complex())
            self._young.append(block)
        elif phase == "forward":
            block.root = func is torch.ops.aten.ones_like.default
        self._ledger.resize(block, storage.nbytes(), where)

    # -- phases, nodes, modules --------------------------------------------------------------------

    def _enter_phase(self) -> Phase:
        """The phase of the op that has just run; settles what earlier phases and nodes have left."""
        task = torch._C._current_graph_task_id()
        if self._stepping is not None and self._stepping[1] == task and not torch.is_grad_enabled():
            self._leave_node()
            return "optimizer"
        if task == -1:
            self._leave_node()
            return "forward"
        if task != self._task:
            self._task = task
            for block in self._ledger.blocks():
                if block.phase == "forward" and not block.settled and block.alive:
                    block.settle("gradient" if block.root else "activation")
        node = torch._C._current_autograd_node()
        # not the node itself: it would keep what it has saved alive
        key = None if node is None else (type(node), node._sequence_nr())
        if key != self._node:
            self._leave_node()
            self._node = key
        return "backward"

    def _leave_node(self) -> None:
        """Settle what the last autograd node made and has left behind."""
        self._ledger.drain()
        for block in self._young:
            if block.alive and not block.settled:
                block.settle("activation" if block.recomputed else "gradient")
        self._young.clear()
        self._node = None

    def _module(self, phase: Phase) -> str:
        if phase == "forward":
            frame = self._calls.current if self._calls is not None else None
            return frame.fqn if frame is not None else ""
        if phase == "backward" and self._sequence:
            node = torch._C._current_autograd_node()
            variable = getattr(node, "variable", None)
            if variable is not None:
                block = self._ledger.find(variable.untyped_storage())
                return block.module if block is not None else ""
            if node is not None:
                index = bisect_right(self._sequence, node._sequence_nr()) - 1
                return self._owner[index] if index >= 0 else ""
        return ""

    def _frame_begins(self, frame: Frame) -> None:
        self._sequence.append(torch._C._autograd._get_sequence_nr())
        self._owner.append(frame.fqn)

    def _frame_ends(self, frame: Frame) -> None:
        self._sequence.append(torch._C._autograd._get_sequence_nr())
        self._owner.append(frame.parent.fqn if frame.parent is not None else "")

    def _step_begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._stepping is None:
            with self._lock:
                self._leave_node()
                self._adopt_optimizer(optimizer)
            self._stepping = (id(optimizer), torch._C._current_graph_task_id())

    def _step_ends(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with self._lock:
            self._adopt_optimizer(optimizer)
        if self._stepping is not None and self._stepping[0] == id(optimizer):
            self._stepping = None

    # -- what is known from outside ----------------------------------------------------------------

    def _adopt(self, tensor: torch.Tensor, category: Category, module: str | None) -> None:
        if tensor.device.type != self.device.type:
            return
        for storage in storages_of(tensor):
            block = self._ledger.find(storage)
            if block is None:
                block = self._ledger.open(storage, Block(category, module or "", "forward", True))
                self._ledger.resize(block, storage.nbytes(), None)
            elif block.category != "parameter":
                block.settle(category, module)

    def _adopt_model(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            module = name.rpartition(".")[0]
            self._adopt(parameter, "parameter", module)
            self.precision = self.precision or PRECISIONS.get(parameter.dtype, "")
            if parameter.grad is not None:
                self._adopt(parameter.grad, "gradient", module)
        for name, buffer in model.named_buffers():
            self._adopt(buffer, "buffer", name.rpartition(".")[0])

    def _adopt_optimizer(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._adopt(parameter, "parameter", None)
                owner = self._ledger.find(parameter.untyped_storage()) if not parameter.is_sparse else None
                module = owner.module if owner is not None else None
                if parameter.grad is not None:
                    self._adopt(parameter.grad, "gradient", module)
                for state in tree_iter(dict(optimizer.state.get(parameter, {}))):
                    if isinstance(state, torch.Tensor):
                        self._adopt(state, "optimizer_state", module)

    def _read_cuda_peaks(self) -> None:
        """Take the allocator's peaks (allocated, reserved, requested) before someone resets them."""
        if self not in self._entered or self.device.type != "cuda" or not torch.cuda.is_available():
            return
        stats = torch.cuda.memory_stats(self.device)
        now = tuple(int(stats.get(f"{kind}_bytes.all.peak", 0)) for kind in ("allocated", "reserved", "requested"))
        before = self._cuda_peaks or (0, 0, 0)
        self._cuda_peaks = cast(tuple[int, int, int], tuple(max(a, b) for a, b in zip(before, now, strict=True)))


def _device_of(model: nn.Module | None, optimizer: Optimizer | None) -> torch.device:
    if model is not None:
        for tensor in model.parameters():
            return tensor.device
    if optimizer is not None:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                return cast(torch.Tensor, tensor).device
    return torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
