"""Image classifiers of torchvision and timm, with random weights and 1000 classes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vdnn.errors import UsageError, unknown_name
from vdnn.models.fakes import cpu_numbers_are_real
from vdnn.models.options import Option, identity, read, whole
from vdnn.models.work import Work, built, classes, cross_entropy, images

__all__ = ["timm_names", "timm_work", "torchvision_names", "torchvision_work"]

CLASSES = 1000
OPTIONS = {"image_size": Option(whole, "height and width of the images in pixels")}


def missing(package: str) -> UsageError:
    """What to do when an optional package is not there."""
    return UsageError(f"{package} is not installed: pip install 'vdnn[models]'")


def classifier(
    name: str, batch: int, options: tuple[tuple[str, str], ...], size: tuple[int, int, int], make: Any
) -> Work:
    """A work whose model maps images of `size` (channels, height, width) to 1000 classes."""
    return Work(
        name=name,
        batch=batch,
        options=options,
        build=built(name, options, make),
        inputs=lambda device: ((images(batch, size, device),), {}),
        targets=lambda device: classes((batch,), CLASSES, device),
        loss=cross_entropy,
    )


# -- torchvision ---------------------------------------------------------------------------------


@functools.cache
def torchvision_names() -> tuple[str, ...]:
    """Names of torchvision's image classifiers.

    Raises:
        UsageError: torchvision is not installed.
    """
    try:
        from torchvision import models
    except ImportError:
        raise missing("torchvision") from None
    return tuple(models.list_models(module=models))


def _torchvision_size(model: str) -> int:
    """The image size that the model's first published weights are evaluated at; 224 where that is fine-tuned."""
    from torchvision import models

    weights = {w.name: w for w in models.get_model_weights(model)}
    if "IMAGENET1K_V1" not in weights:
        return 224
    return int(weights["IMAGENET1K_V1"].transforms.keywords["crop_size"])


def torchvision_work(model: str, batch: int, given: Mapping[str, object]) -> Work:
    """`torchvision:NAME`.

    Raises:
        UsageError: no such model, or an option that it does not have.
    """
    if model not in torchvision_names():
        raise unknown_name("torchvision model", model, torchvision_names())
    name = f"torchvision:{model}"
    values = read(name, given, OPTIONS)
    size = values.get("image_size", _torchvision_size(model))

    def make() -> nn.Module:
        from torchvision import models

        arguments: dict[str, Any] = {}
        if model in ("inception_v3", "googlenet"):
            arguments = {"init_weights": True, "aux_logits": True}  # as the defaults, but without their warning
        elif model.startswith("vit_"):
            arguments = {"image_size": size}
        elif model.startswith("maxvit"):
            arguments = {"input_size": (size, size)}
        # RegNet computes its widths and depths with tensors and reads them back
        makers = (torch.arange, torch.tensor) if model.startswith("regnet_") else ()
        with cpu_numbers_are_real(*makers) as finished:
            return finished(models.get_model(model, weights=None, **arguments))

    return classifier(name, batch, identity(values), (3, size, size), make)


# -- timm ----------------------------------------------------------------------------------------


@functools.cache
def timm_names() -> tuple[str, ...]:
    """Names of timm's models.

    Raises:
        UsageError: timm is not installed.
    """
    try:
        import timm
    except ImportError:
        raise missing("timm") from None
    return tuple(timm.list_models())


def timm_work(model: str, batch: int, given: Mapping[str, object]) -> Work:
    """`timm:NAME`; the image size is that of the model's own configuration.

    Raises:
        UsageError: no such model, or an option that it does not have.
    """
    if model.partition(".")[0] not in timm_names():
        raise unknown_name("timm model", model, timm_names())
    import timm

    name = f"timm:{model}"
    values = read(name, given, OPTIONS)
    config = timm.models.get_pretrained_cfg(model, allow_unregistered=True)
    channels, height, width = config.input_size if config is not None else (3, 224, 224)
    arguments: dict[str, Any] = {}
    if "image_size" in values:
        height = width = values["image_size"]
        if config is not None and config.fixed_input_size:  # its parameters depend on the image size
            arguments["img_size"] = height

    def make() -> nn.Module:
        with cpu_numbers_are_real() as finished:
            return finished(timm.create_model(model, pretrained=False, num_classes=CLASSES, **arguments))

    return classifier(name, batch, identity(values), (channels, height, width), make)
