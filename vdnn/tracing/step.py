"""`capture_model`, `capture_work`: one training step, run on fake tensors and written down.

with FakeTensorMode():                       shapes and storages, no values, no memory
    model, inputs on fake "cuda"             autograd saves what it would save on a GPU
    with Recorder(), saved_tensors_hooks:    forward and loss
        Backward.of(loss)                    backward: the engine itself would ask for the device
        optimizer.step()                     the second one: its states exist
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_leaves

from vdnn.calls import ModuleCalls
from vdnn.errors import CaptureError, UsageError, VdnnError, unknown_name
from vdnn.models import Work
from vdnn.tracing import attention, hardware, rnn, stage
from vdnn.tracing.assembly import assembled
from vdnn.tracing.hooks import creator
from vdnn.tracing.losses import summed_loss
from vdnn.tracing.recorder import Recorder
from vdnn.tracing.watch import Watch
from vdnn.values import USUAL, Recipe, Trace

__all__ = ["OPTIMIZERS", "PRECISIONS", "capture_model", "capture_work"]

PRECISIONS = ("fp32", "amp", "amp-bf16", "bf16")
OPTIMIZERS = ("none", "sgd", "sgd-nesterov", "adamw")
# what errors say when an op asks for the CUDA driver
_DRIVER = ("NVIDIA driver", "CUDA driver", "hasPrimaryContext", "CUDA GPUs", "CUDA error", "cuDNN error")
_AUTOCAST = {"amp": torch.float16, "amp-bf16": torch.bfloat16}


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
    recipe: Recipe = USUAL,
) -> Trace:
    """Capture one training step, or one forward (of a recipe for inference).

    Nothing is computed, and the model given is not touched.

    Args:
        model: a module (its shapes are taken), or a function that builds one on the default device.
        args: the inputs, or a function from a device to (args, kwargs).
        loss: from the model's output to a scalar; default: the sum of its floating tensors.
        targets: tensors that `loss` uses, already on fakes: part of the input, as the training loop holds them.
        device: "cuda", or "cpu" for runs on a CPU or a virtual device.
        recipe: how the step is run.

    Raises:
        UsageError: an unknown precision, optimizer or device, or an optimizer for inference.
        CaptureError: the step needs values that fakes do not have; names the op and the module.
    """
    for what, value, known in (
        ("precision", precision, PRECISIONS),
        ("optimizer", optimizer, OPTIMIZERS),
        ("device", device, ("cuda", "cpu")),
    ):
        if value not in known:
            raise unknown_name(what, str(value), known)
    if recipe.step == "inference" and optimizer != "none":
        raise UsageError(f"inference has no optimizer, but {optimizer!r} is given: leave it out, or take step=training")
    step = _Step(model, args, kwargs, loss or summed_loss, targets, precision, optimizer, channels_last, name, recipe)

    def on(place: str, *why: str) -> Trace:
        capture, built = step.captured(place, device)
        corrections = list(why)
        if device == "cuda":
            corrections += hardware.said(place, precision in _AUTOCAST, capture.recurrent, recipe.attention == "math")
        return assembled(
            capture, built, batch, precision, optimizer, device, channels_last, options, corrections, recipe
        )

    if device == "cpu":
        return on("cpu")
    if torch.version.cuda is None:  # there a fake CUDA tensor ends the process
        return on("cpu", "this torch is built without CUDA")
    try:
        return on("cuda")
    except CaptureError as error:
        cause = stage.short(error.__cause__) if error.__cause__ is not None else ""
        if not any(sign in cause for sign in _DRIVER):
            raise
        why = f"an op asks for the driver ({str(error).split('cannot be captured: ')[-1].split(': ')[0]})"
    return on("cpu", why)


@dataclass(slots=True)
class _Step:
    """What is captured; on fake tensors of one device, and if need be once more on those of another."""

    model: nn.Module | Callable[[], nn.Module]
    args: tuple[Any, ...] | Callable[[str], tuple[tuple[Any, ...], dict[str, Any]]]
    kwargs: dict[str, Any] | None
    loss: Callable[[Any], torch.Tensor]
    targets: Any
    precision: str
    optimizer: str
    channels_last: bool
    name: str
    recipe: Recipe

    def captured(self, place: str, device: str) -> tuple[Watch, str]:
        """The step of `device`, run on fakes of `place`; and the model's name."""
        math = self.recipe.attention == "math"
        with contextlib.ExitStack() as around:
            around.enter_context(stage.undisturbed())
            mode = around.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
            if math:
                around.enter_context(attention.unfused())
            try:
                model, given = self._made(mode, place)
            except VdnnError:
                raise
            except Exception as error:
                what = f"{self.name or 'the model'} cannot be built on fake tensors: {stage.short(error)}"
                raise CaptureError(what) from error
            name = self.name or (type(self.model) if isinstance(self.model, nn.Module) else type(model)).__name__
            if self.precision == "bf16":
                model, given = stage.lowered_to_bfloat16(model, given)
            if self.channels_last:
                model, given = stage.channels_last(model, given)
            if self.recipe.step == "inference":
                model.eval()
            capture = Watch(model, place, mode, hardware.rules(place, device), as_cuda=device == "cuda")
            capture.recurrent = device == "cuda" and rnn.flattened(model)
            with contextlib.ExitStack() as stack:
                if device == "cuda":
                    stack.enter_context(hardware.as_on_cuda(place, self.precision in _AUTOCAST, math))
                _run(capture, given, self.targets, self.loss, self.precision, self.optimizer, name, self.recipe)
            return capture, name

    def _made(self, mode: FakeTensorMode, place: str) -> tuple[nn.Module, Any]:
        if isinstance(self.model, nn.Module):
            model = stage.faked(mode, place, self.model)
        else:
            with torch.device(place):
                model = self.model()
        if callable(self.args):
            with torch.device(place):
                return model, self.args(place)
        return model, stage.faked(mode, place, (tuple(self.args), dict(self.kwargs or {})))


def _run(
    capture: Watch,
    given: Any,
    targets: Any,
    loss: Callable[[Any], torch.Tensor],
    precision: str,
    optimizer: str,
    name: str,
    recipe: Recipe,
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
    steps = stage.make_optimizer(optimizer, model, recipe.optimizer_impl)
    in_place = recipe.zero_grad == "in-place" and recipe.step == "training"
    try:
        with stage.outside_the_engine():
            if steps is not None or in_place:
                with capture.unseen(), rec:
                    _first_step(model, steps, rec, capture.device, in_place)
            calls = ModuleCalls(model, capture.begin, capture.end)
            calls.attach()
            try:
                with contextlib.ExitStack() as stack:
                    stack.enter_context(capture.hooks.noted())
                    stack.enter_context(capture.walk.instead_of_the_engine())
                    stack.enter_context(rec)
                    results = _forward_backward(capture, given, loss, precision, recipe)
                    if in_place:
                        _without_ungiven(model, capture)
                    rec.phase = "optimizer"
                    if steps is not None:
                        _without_unused(steps, rec, capture.device)
                        steps.step()
                    if in_place:
                        (steps or model).zero_grad(set_to_none=False)
                    del results  # a training loop holds output and loss until its step is over
            finally:
                calls.detach()
    except VdnnError:
        raise
    except Exception as error:
        raise _explained(capture, error, name) from error


def _forward_backward(
    capture: Watch, given: Any, loss: Callable[[Any], torch.Tensor], precision: str, recipe: Recipe
) -> Any:
    args, kwargs = given
    with contextlib.ExitStack() as casting:
        casting.enter_context(stage.autocast_as_on_cuda(capture.device, _AUTOCAST.get(precision)))
        if recipe.step == "inference":
            with torch.no_grad():
                return capture.model(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(capture.pack, capture.unpack):
            output = capture.model(*args, **kwargs)
            value = loss(output)
        if value.numel() != 1 or creator(value) is None:
            raise UsageError(f"the loss has shape {tuple(value.shape)} and must be one number that needs a gradient")
        if not recipe.backward_autocast:
            casting.close()
        capture.backward(value)
    return output, value


def _first_step(
    model: nn.Module, steps: torch.optim.Optimizer | None, rec: Recorder, device: str, in_place: bool
) -> None:
    """The step before the one that is reported: it makes the optimizer's states, and gradients that stay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    if steps is not None:
        steps.step()
    for parameter in trained:
        if not in_place:
            parameter.grad = None
        elif parameter.grad is not None and parameter.grad.device.type == device:
            rec.stores[rec.store_of(parameter.grad)].category = "gradient"
    for state in steps.state.values() if steps is not None else ():
        for tensor in state.values():
            if isinstance(tensor, torch.Tensor) and tensor.device.type == device:
                rec.stores[rec.store_of(tensor)].category = "optimizer_state"


def _without_ungiven(model: nn.Module, capture: Watch) -> None:
    """A parameter that backward gave no gradient never had one."""
    for parameter in model.parameters():
        if parameter.grad is not None and parameter not in capture.walk.given:
            if parameter.grad.device.type == capture.device:
                capture.recorder.stores[capture.recorder.store_of(parameter.grad)].nbytes = 0
            parameter.grad = None


def _without_unused(steps: torch.optim.Optimizer, rec: Recorder, device: str) -> None:
    """A parameter without a gradient never had states."""
    for parameter, state in steps.state.items():
        if parameter.grad is None:
            for tensor in state.values():
                if isinstance(tensor, torch.Tensor) and tensor.device.type == device:
                    rec.stores[rec.store_of(tensor)].nbytes = 0


def _explained(capture: Watch, error: Exception, name: str) -> CaptureError:
    where = capture.broken or capture.frame
    module = f"module {where.fqn or '<model>'} ({type(where.module).__name__})" if where else "the loss or backward"
    last = capture.recorder.ops[-1].name if capture.recorder.ops else "none"
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return CaptureError(
            f"{name} cannot be captured: {module} asks for the value of a tensor ({error}), and a capture has shapes "
            "only; take that branch out of forward, or go without a plan: vdnn.wrap offloads such a model by rule"
        )
    if "convert all Tensors to FakeTensors" in str(error):
        return CaptureError(
            f"{name} cannot be captured: {module}, after op {last}, uses a real tensor that is neither a parameter, a "
            "buffer, an attribute of a module nor an input: keep it in the module (register_buffer), or make it in "
            f"forward ({str(error).split('Found in ')[-1][:200]})"
        )
    return CaptureError(f"{name} cannot be captured: in {module}, after op {last}: {stage.short(error)}")


def capture_work(
    work: Work,
    *,
    precision: str = "fp32",
    optimizer: str = "none",
    channels_last: bool = False,
    device: str = "cuda",
    recipe: Recipe = USUAL,
) -> Trace:
    """Capture one training step of a work, built on fake tensors, or its forward (of a recipe for inference).

    Raises:
        UsageError: an unknown precision, optimizer or device, or an optimizer for inference.
        CaptureError: the step needs values that fakes do not have; names the op and the module.
    """

    targets: list[Any] = []  # made with the inputs: a training loop has them before the step

    def inputs(place: str) -> Any:
        targets[:] = [work.targets(place)] if recipe.step == "training" else []
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
        recipe=recipe,
    )
