"""Models of the user's own: `path/to/file.py:factory`.

The factory is a function of the batch size, and of options if it takes any (they arrive as texts from a
command line). It builds on the current default device and dtype, and returns one of

    module                       the inputs are one batch of images, 3 × 224 × 224 (or its `image_size`)
    module, inputs               a tensor, a tuple of positional or a dict of keyword arguments,
                                 or a function of the device that makes them
    module, inputs, loss         loss(output) gives a scalar; without it: the output's `.loss` where it has one,
                                 else the sum of the floating tensors in the output

    def tiny(batch: int, width: int = 8):
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, int(width)))
        return model, torch.randn(batch, 3, 4, 4), lambda output: output.square().mean()

Inputs that are tensors belong to one call of the factory: `Work.inputs` calls it again to have them on its
device. A function of the device avoids that second building of the model.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vdnn.errors import UsageError, VdnnError, unknown_name
from vdnn.models.fakes import initialisers_skipped
from vdnn.models.options import identity
from vdnn.models.work import Device, Inputs, Work, images, summed

__all__ = ["factory_work"]


def factory_work(name: str, batch: int, given: Mapping[str, object]) -> Work:
    """`path/to/file.py:factory`.

    Raises:
        UsageError: no such file or function, a file that raises, or options that the factory does not take.
    """
    path_text, _, function = name.rpartition(":")
    if not path_text.endswith(".py"):
        raise UsageError(f"{name!r} does not name a function: write it like {name}:make_model")
    path = Path(path_text)
    if not path.is_file():
        raise UsageError(f"there is no file {path}: the model {name!r} is a path and a function in that file")
    factory = _function(path, function)
    _check_options(factory, path, function, given)
    made = _Made(factory, path, function, batch, given)
    return Work(
        name=name,
        batch=batch,
        options=identity(given),
        build=made.build,
        inputs=made.inputs,
        targets=lambda device: None,
        loss=made.loss,
    )


def _function(path: Path, function: str) -> Callable[..., Any]:
    module = _run(path)
    own = {
        key: value
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    }
    found = vars(module).get(function)
    if not callable(found):
        if not own:
            raise UsageError(f"{path} defines no function, so it has no {function!r}")
        raise unknown_name(f"function in {path}", function, own)
    result: Callable[..., Any] = found
    return result


def _run(path: Path) -> ModuleType:
    """The user's file as a module of its own; its folder is importable while it runs, as for a script."""
    name = f"vdnn_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up by name
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _explained(error, path, f"{path} cannot be loaded") from error
    finally:
        sys.path.remove(folder)
    return module


def _explained(error: BaseException, path: Path, what: str) -> UsageError:
    """The user's error with the lines of the user's own files that led to it."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return UsageError(f"{what}: {path}:{error.lineno}: {type(error).__name__}: {error.msg}")
    folder = path.resolve().parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve().is_relative_to(folder)]
    own = [f for f in frames if "site-packages" not in f.filename][-3:]
    where = "".join(f"\n  {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in own)
    return UsageError(f"{what}: {type(error).__name__}: {error}{where}")


def _check_options(factory: Callable[..., Any], path: Path, function: str, given: Mapping[str, object]) -> None:
    parameters = list(inspect.signature(factory).parameters.values())
    if not parameters:
        raise UsageError(f"{path}:{function} takes no argument: write it as def {function}(batch)")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for option in given:
        if option not in known:
            if not known:
                raise UsageError(f"{path}:{function} has no option {option!r}: it takes the batch size only")
            raise unknown_name(f"option of {path}:{function}", option, known)


class _Made:
    """What the factory returned: the model goes to its caller, functions for inputs and loss are kept."""

    def __init__(
        self, factory: Callable[..., Any], path: Path, function: str, batch: int, options: Mapping[str, object]
    ) -> None:
        self._factory = factory
        self._path = path
        self._function = function
        self._batch = batch
        self._options = dict(options)
        self._make_inputs: Callable[[Device], Any] | None = None
        self._loss: Callable[[Any], Tensor] | None = None

    def _call(self) -> tuple[nn.Module, Any]:
        """The factory's model and inputs; None for inputs where it gives none."""
        name = f"{self._path}:{self._function}"
        try:
            with initialisers_skipped():
                made = self._factory(self._batch, **self._options)
        except VdnnError:
            raise
        except Exception as error:
            raise _explained(error, self._path, f"{name} failed") from error
        parts = made if isinstance(made, tuple) else (made,)
        if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise UsageError(f"{name} returned ({kinds}): return a module, (module, inputs) or (module, inputs, loss)")
        inputs = parts[1] if len(parts) > 1 else None
        loss = parts[2] if len(parts) > 2 else None
        if loss is not None and not callable(loss):
            raise UsageError(f"{name} returned a {type(loss).__name__} as loss: it must be a function of the output")
        self._loss = loss
        self._make_inputs = inputs if callable(inputs) and not isinstance(inputs, Tensor) else None
        return parts[0], inputs

    def build(self) -> nn.Module:
        return self._call()[0].train()

    def inputs(self, device: Device) -> Inputs:
        made: Any = None
        if self._make_inputs is None:
            with torch.device(device):
                made = self._call()[1]
        if self._make_inputs is not None:
            try:
                made = self._make_inputs(device)
            except Exception as error:
                raise _explained(error, self._path, f"{self._path}:{self._function}: its inputs failed") from error
        if made is None:
            size = int(str(self._options.get("image_size", 224)))
            made = images(self._batch, (3, size, size), device)
        if isinstance(made, dict):
            return (), {key: _moved(value, device) for key, value in made.items()}
        values = made if isinstance(made, tuple | list) else (made,)
        return tuple(_moved(value, device) for value in values), {}

    def loss(self, output: Any, targets: None) -> Tensor:
        if self._loss is None:
            own = getattr(output, "loss", None)
            return own if isinstance(own, Tensor) else summed(output, targets)
        loss = self._loss(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shown = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UsageError(f"the loss of {self._path}:{self._function} returned {shown}: it must be one number")
        return loss


def _moved(value: Any, device: Device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
