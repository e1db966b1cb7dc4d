"""`Work`: a model with everything one training step of it needs, and nothing built yet.

    work = load("torchvision:resnet50", batch=256)
    with FakeTensorMode(), torch.device("cuda"):        # or torch.device("cpu") alone, for a real run
        model = work.build()
        args, kwargs = work.inputs("cuda")
        targets = work.targets("cuda")
        loss = work.loss(model(*args, **kwargs), targets)

The same four calls serve a capture on fake tensors and a run on a real device. Inputs and targets are drawn
on the CPU from a generator with a fixed seed and then moved: every device trains on the same numbers. The
weights come from torch's global generator: `torch.manual_seed` before `build()` makes them repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdnn.errors import UsageError, VdnnError
from vdnn.models.fakes import initialisers_skipped

__all__ = [
    "Device",
    "Inputs",
    "Work",
    "built",
    "classes",
    "cross_entropy",
    "images",
    "own_loss",
    "summed",
    "tokens",
]

Device = torch.device | str
Inputs = tuple[tuple[Any, ...], dict[str, Any]]

# One seed for all inputs, another for targets: labels must not be the first numbers of the inputs.
_INPUT_SEED = 20161015
_TARGET_SEED = _INPUT_SEED + 1


@dataclass(frozen=True)
class Work:
    """A model by name, with a batch of inputs and a loss.

    `name` and `options` (as given, sorted, as text) with `batch` are its identity. `build` makes the model in
    training mode on the current default device and dtype. `inputs` gives (args, kwargs) of the model's call,
    `targets` what `loss(output, targets)` compares with: None where the model computes its own loss.
    """

    name: str
    batch: int
    options: tuple[tuple[str, str], ...]
    build: Callable[[], nn.Module]
    inputs: Callable[[Device], Inputs]
    targets: Callable[[Device], Any]
    loss: Callable[[Any, Any], Tensor]

    def __str__(self) -> str:
        return " ".join([self.name, f"batch={self.batch}", *(f"{key}={value}" for key, value in self.options)])


# -- inputs and targets --------------------------------------------------------------------------


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)


def images(batch: int, size: tuple[int, int, int], device: Device) -> Tensor:
    """Normal noise of shape (batch, *size) in the default dtype."""
    noise = torch.randn(batch, *size, generator=_generator(_INPUT_SEED), device="cpu")
    return noise.to(device)


def tokens(batch: int, sequence: int, vocabulary: int, device: Device) -> Tensor:
    """Random token ids of shape (batch, sequence)."""
    ids = torch.randint(vocabulary, (batch, sequence), generator=_generator(_INPUT_SEED), device="cpu")
    return ids.to(device)


def classes(shape: tuple[int, ...], number: int, device: Device) -> Tensor:
    """Random class labels below `number`."""
    labels = torch.randint(number, shape, generator=_generator(_TARGET_SEED), device="cpu")
    return labels.to(device)


# -- losses --------------------------------------------------------------------------------------


def cross_entropy(output: Any, targets: Tensor) -> Tensor:
    """Cross entropy with the class in the last dimension; summed over the outputs of a model with several.

    Inception and GoogLeNet return their auxiliary classifiers beside the main one in training.
    """
    outputs = output if isinstance(output, tuple | list) else (output,)
    losses = [F.cross_entropy(logits.flatten(0, -2), targets.flatten()) for logits in outputs if logits is not None]
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def own_loss(output: Any, targets: None) -> Tensor:
    """The loss that the model computed from labels among its inputs."""
    loss = output.loss
    assert isinstance(loss, Tensor)
    return loss


def summed(output: Any, targets: None) -> Tensor:
    """The sum of every floating tensor in the output: a loss for a model of unknown purpose."""
    found: list[Tensor] = []

    def look(part: Any) -> None:
        if isinstance(part, Tensor):
            if part.is_floating_point():
                found.append(part.sum())
        elif isinstance(part, dict):
            for value in part.values():
                look(value)
        elif isinstance(part, tuple | list):
            for value in part:
                look(value)

    look(output)
    if not found:
        raise UsageError(
            f"the model returns {type(output).__name__} without a floating tensor: there is nothing to train"
        )
    return torch.stack(found).sum() if len(found) > 1 else found[0]


# -- building ------------------------------------------------------------------------------------


def built(name: str, options: tuple[tuple[str, str], ...], make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """`Work.build` from a function that makes the model: training mode, and options it refuses are explained."""

    def build() -> nn.Module:
        try:
            with initialisers_skipped():
                model = make()
        except VdnnError:
            raise
        except (ValueError, AssertionError, TypeError) as error:
            chosen = " ".join(f"{key}={value}" for key, value in options) or "its defaults"
            raise UsageError(f"{name} cannot be built with {chosen}: {error}") from error
        return model.train()

    return build
