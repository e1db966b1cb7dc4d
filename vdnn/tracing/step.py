"""`capture_model`, `capture_work`: one training step, run on fake tensors and written down.

    with FakeTensorMode():                       shapes and storages, no values, no memory
        model, inputs on fake "cuda"             autograd saves what it would save on a GPU
        with Recorder(), saved_tensors_hooks:    forward and loss
            walk(loss)                           backward: the engine itself would ask for the device
            optimizer.step()                     the second one: its states exist

The pack hook hands out a stand-in that does not hold the tensor, so the trace sees when forward itself lets go
of a storage; at unpack all stand-ins of one storage come back as views of one new fake storage, so the trace
sees when backward lets go of it.
"""

from __future__ import annotations

import contextlib
import sys
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from vdnn.calls import Frame, ModuleCalls
from vdnn.errors import CaptureError, UsageError, VdnnError, unknown_name
from vdnn.models import Work
from vdnn.tracing import stage
from vdnn.tracing.assembly import assembled
from vdnn.tracing.attention import HardwareAttention
from vdnn.tracing.layers import layer_kind
from vdnn.tracing.recorder import Recorder
from vdnn.tracing.walk import walk
from vdnn.values import Trace

__all__ = ["OPTIMIZERS", "PRECISIONS", "capture_model", "capture_work", "summed_loss"]

PRECISIONS = ("fp32", "amp", "amp-bf16", "bf16")
OPTIMIZERS = ("none", "sgd", "adamw")
_AUTOCAST = {"amp": torch.float16, "amp-bf16": torch.bfloat16}


def summed_loss(output: Any) -> torch.Tensor:
    """The sum of every floating tensor in a model's output."""
    parts = [t.float().sum() for t in _tensors(output) if t.is_floating_point() and t.requires_grad]
    if not parts:
        raise UsageError("the model's output has no floating tensor that needs a gradient: there is nothing to train")
    return torch.stack(parts).sum() if len(parts) > 1 else parts[0]


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, dict):  # Hugging Face's outputs are dicts, but no pytrees
        return [t for value in output.values() for t in _tensors(value)]
    return [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]


class _StandIn:
    """What the pack hook hands to autograd: where the tensor is, not the tensor."""

    __slots__ = ("dtype", "offset", "saved", "shape", "store", "stride")

    def __init__(self, store: int, saved: int, tensor: torch.Tensor) -> None:
        self.store = store
        self.saved = saved
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()


class _Direct:
    """A tensor that lives outside the step anyway (a parameter, a buffer, another device's)."""

    __slots__ = ("saved", "tensor")

    def __init__(self, saved: int, tensor: torch.Tensor) -> None:
        self.saved = saved
        self.tensor = tensor


class _Capture:
    """One capture in progress."""

    def __init__(self, model: nn.Module, device: str, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.model = model
        self.device = device
        self.recorder = Recorder(device)
        self.calls: list[list[Any]] = []
        self.saved: list[list[Any]] = []
        self.changes: list[tuple[int, int]] = [(-1, -1)]  # (autograd sequence number, module call from there on)
        self.outside = 0
        self.node = ""
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
        self.saved.append([frame.slot if frame is not None else -1, index, number, form, len(rec.ops), [], ""])
        if tensor.untyped_storage()._cdata in self.fixed:
            return _Direct(len(self.saved) - 1, tensor)
        return _StandIn(number, len(self.saved) - 1, tensor)

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
            self.saved[packed.saved][5].append(len(rec.ops))
            self.saved[packed.saved][6] = self.node  # at pack there is no telling which node it is for
        if isinstance(packed, _Direct):
            return packed.tensor
        store = rec.stores[packed.store]
        if store.need < 0:
            store.need = len(rec.ops)
        storage = store.ref()
        if storage is not None:
            store.held = store.held or "output"
        elif store.restored is not None:
            storage = store.restored()
        rec.active = False
        # the fake mode's dispatch cache would keep the storage that set_ is given
        cached, self.mode.cache_enabled = self.mode.cache_enabled, False
        try:
            with torch.no_grad():
                if storage is None:
                    storage = torch.empty(store.nbytes, dtype=torch.uint8, device=self.device).untyped_storage()
                    rec.alias(storage, packed.store)
                tensor = torch.empty(0, dtype=packed.dtype, device=self.device)
                tensor.set_(storage, packed.offset, packed.shape, packed.stride)
        finally:
            rec.active = True
            self.mode.cache_enabled = cached
        return tensor

    # -- backward ----------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor) -> None:
        rec = self.recorder
        rec.phase = "backward"
        numbers = [number for number, _ in self.changes]

        def on_node(node: Any) -> None:
            self.node = str(node.name())
            sequence = int(node._sequence_nr())
            if sequence < 2**62:  # AccumulateGrad has the largest: it stays with the node before it
                rec.module = self.changes[bisect_right(numbers, sequence) - 1][1]

        def on_grad(grad: torch.Tensor) -> None:
            if grad.device.type == self.device and grad.layout is torch.strided:
                store = rec.stores[rec.store_of(grad)]
                store.category = store.category or "gradient"

        with torch.no_grad():
            walk(loss, on_node, on_grad)
        rec.module = -1


def capture_model(
    model: nn.Module | Callable[[], nn.Module],
    args: tuple[Any, ...] | Callable[[str], tuple[tuple[Any, ...], dict[str, Any]]] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
    targets: Any = (),
    precision: str = "fp32",
    optimizer: str = "none",
    channels_last: bool = False,
    device: str = "cuda",
    name: str = "",
    batch: int = 0,
    options: tuple[tuple[str, str], ...] = (),
) -> Trace:
    """Capture one training step. Nothing is computed, and the model given is not touched.

    Args:
        model: a module (its shapes are taken), or a function that builds one on the default device.
        args: the inputs, or a function from a device to (args, kwargs).
        loss: from the model's output to a scalar; default: the sum of its floating tensors.
        targets: tensors that `loss` uses, already on fakes: part of the input, as the training loop holds them.
        device: "cuda", or "cpu" for runs on a CPU or a virtual device.

    Raises:
        UsageError: an unknown precision, optimizer or device.
        CaptureError: the step needs values that fakes do not have; names the op and the module.
    """
    for what, value, known in (
        ("precision", precision, PRECISIONS),
        ("optimizer", optimizer, OPTIMIZERS),
        ("device", device, ("cuda", "cpu")),
    ):
        if value not in known:
            raise unknown_name(what, str(value), known)
    corrections: list[str] = []
    if device == "cuda" and torch.version.cuda is None:
        raise CaptureError(
            "this torch is built without CUDA, and a CUDA step cannot be captured with it: install a CUDA build of "
            "torch (it needs no GPU), or capture for the CPU (device='cpu')"
        )
    given: Any = None
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        try:
            if isinstance(model, nn.Module):
                fake = stage.faked(mode, device, model)
                built = type(model).__name__
            else:
                with torch.device(device):
                    fake = model()
                built = type(fake).__name__
            if callable(args):
                with torch.device(device):
                    given = args(device)
            else:
                given = stage.faked(mode, device, (tuple(args), dict(kwargs or {})))
        except VdnnError:
            raise
        except Exception as error:
            what = f"{name or 'the model'} cannot be built on fake tensors: {stage.short(error)}"
            raise CaptureError(what) from error
        if precision == "bf16":
            fake, given = stage.lowered_to_bfloat16(fake, given)
        if channels_last:
            fake = fake.to(memory_format=torch.channels_last)
            given = tree_map_only(
                torch.Tensor, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t, given
            )
        capture = _Capture(fake, device, mode)
        _run(capture, given, targets, loss or summed_loss, precision, optimizer, name or built)
        if device == "cuda":
            corrections.append(
                "attention kernel chosen as CUDA would: flash, or memory-efficient with a mask or in fp32"
            )
        return assembled(
            capture, name or built, batch, precision, optimizer, device, channels_last, options, corrections
        )


def _run(
    capture: _Capture,
    given: Any,
    targets: Any,
    loss: Callable[[Any], torch.Tensor],
    precision: str,
    optimizer: str,
    name: str,
) -> None:
    rec, model = capture.recorder, capture.model
    for fqn, parameter in model.named_parameters():
        store = rec.stores[rec.store_of(parameter)] if parameter.device.type == capture.device else None
        if store is not None:
            store.category, store.name = "parameter", fqn
            capture.fixed.add(parameter.untyped_storage()._cdata)
    for fqn, buffer in model.named_buffers():
        if buffer.device.type == capture.device:
            store = rec.stores[rec.store_of(buffer)]
            store.category, store.name = "buffer", fqn
            capture.fixed.add(buffer.untyped_storage()._cdata)
    for tensor in tree_leaves((given, targets)):
        if isinstance(tensor, torch.Tensor) and tensor.device.type == capture.device:
            store = rec.stores[rec.store_of(tensor)]
            store.category, store.held = "input", "input"
    steps = stage.make_optimizer(optimizer, model)
    try:
        with stage.outside_the_engine():
            if steps is not None:
                _first_step(steps, rec, capture.device)
            calls = ModuleCalls(model, capture.begin, capture.end)
            calls.attach()
            try:
                with contextlib.ExitStack() as stack:
                    if capture.device == "cuda":
                        stack.enter_context(HardwareAttention())
                    stack.enter_context(rec)
                    results = _forward_backward(capture, given, loss, precision)
                    if steps is not None:
                        rec.phase = "optimizer"
                        steps.step()
                    del results  # a training loop holds output and loss until its step is over
            finally:
                calls.detach()
    except VdnnError:
        raise
    except Exception as error:
        raise _explained(capture, error, name) from error


def _forward_backward(capture: _Capture, given: Any, loss: Callable[[Any], torch.Tensor], precision: str) -> Any:
    args, kwargs = given
    dtype = _AUTOCAST.get(precision)
    with (
        stage.autocast_as_on_cuda(capture.device, dtype),
        torch.autograd.graph.saved_tensors_hooks(capture.pack, capture.unpack),
    ):
        output = capture.model(*args, **kwargs)
        value = loss(output)
    if value.numel() != 1 or value.grad_fn is None:
        raise UsageError(f"the loss has shape {tuple(value.shape)} and must be one number that needs a gradient")
    capture.backward(value)
    return output, value


def _first_step(steps: torch.optim.Optimizer, rec: Recorder, device: str) -> None:
    """The step before the one that is reported: it makes the optimizer's states."""
    for group in steps.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    steps.step()
    steps.zero_grad(set_to_none=True)
    for state in steps.state.values():
        for tensor in state.values():
            if isinstance(tensor, torch.Tensor) and tensor.device.type == device:
                rec.stores[rec.store_of(tensor)].category = "optimizer_state"


def _explained(capture: _Capture, error: Exception, name: str) -> CaptureError:
    where = capture.broken or capture.frame
    module = f"module {where.fqn or '<model>'} ({type(where.module).__name__})" if where else "the loss or backward"
    last = capture.recorder.ops[-1].name if capture.recorder.ops else "none"
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return CaptureError(
            f"{name} cannot be captured: {module} asks for the value of a tensor ({error}), and a capture has shapes "
            "only; take that branch out of forward, or wrap the real model: it then plans from its first step"
        )
    return CaptureError(f"{name} cannot be captured: in {module}, after op {last}: {stage.short(error)}")


def capture_work(
    work: Work, *, precision: str = "fp32", optimizer: str = "none", channels_last: bool = False, device: str = "cuda"
) -> Trace:
    """Capture one training step of a work, built on fake tensors.

    Raises:
        UsageError: an unknown precision, optimizer or device.
        CaptureError: the step needs values that fakes do not have; names the op and the module.
    """

    targets: list[Any] = []  # made with the inputs: a training loop has them before the step

    def inputs(place: str) -> Any:
        targets.append(work.targets(place))
        return work.inputs(place)

    def loss(output: Any) -> torch.Tensor:
        return work.loss(output, targets[0])

    return capture_model(
        work.build,
        inputs,
        loss=loss,
        targets=targets,
        precision=precision,
        optimizer=optimizer,
        channels_last=channels_last,
        device=device,
        name=work.name,
        batch=work.batch,
        options=work.options,
    )
