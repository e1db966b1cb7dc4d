"""The networks of the vDNN paper (Rhu et al., MICRO 2016, section IV) as ordinary modules that train.

    features    CONV, in-place ReLU and POOL layers: what the paper's policies manage and its figures count
    classifier  FC layers with dropout: never offloaded, not counted

* `vgg16` is the paper's: 16 CONV + 3 FC layers in groups of 2-2-4-4-4 (configuration E, today's VGG-19).
* `vgg116` … `vgg416` add 20 CONV layers to each of the five groups per hundred.
* `alexnet` has the sizes of convnet-benchmarks' one-weird-trick version, without normalisation layers.
* `overfeat` is OverFeat's accurate model: 221 × 221 images, six CONV layers, three POOL layers.
* `googlenet` has nine inception modules, and neither normalisation layers nor auxiliary classifiers: so its CONV
  and POOL layers read the 2341 MiB that the paper offloads at batch 128.

`image_size` and `width` (a factor on every channel count) shrink them so that a CPU trains them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vdnn.errors import UsageError, unknown_name
from vdnn.models.options import Option, fraction, identity, read, whole
from vdnn.models.vision import CLASSES, classifier
from vdnn.models.work import Work

__all__ = ["FeatureClassifier", "paper_names", "paper_work"]

OPTIONS = {
    "image_size": Option(whole, "height and width of the images in pixels"),
    "width": Option(fraction, "factor on the number of channels, such as 0.25"),
}


class FeatureClassifier(nn.Module):
    """Feature extraction, then a classifier on the flattened feature maps: (N, 3, S, S) → (N, 1000)."""

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                # plain networks of more than 100 layers pass no signal with torch's default
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        last = classifier[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.01)  # every class equally likely at first

    def forward(self, images: Tensor) -> Tensor:
        logits = self.classifier(self.features(images).flatten(1))
        assert isinstance(logits, Tensor)
        return logits


@dataclass(frozen=True, slots=True)
class Conv:
    """A CONV layer with its in-place ReLU."""

    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


@dataclass(frozen=True, slots=True)
class Pool:
    """A maximum POOL layer."""

    kernel: int
    stride: int


@dataclass(frozen=True, slots=True)
class Network:
    """Feature extraction by layers; the classifier is two hidden FC layers of `hidden` units."""

    image_size: int
    layers: tuple[Conv | Pool, ...]
    hidden: int = 4096


def vgg(extra_layers: int) -> Network:
    """VGG-16 of the paper with `extra_layers` more CONV layers, shared out over its five groups."""
    layers: list[Conv | Pool] = []
    for channels, depth in zip((64, 128, 256, 512, 512), (2, 2, 4, 4, 4), strict=True):
        layers += [Conv(channels)] * (depth + extra_layers // 5) + [Pool(2, 2)]
    return Network(224, tuple(layers))


ALEXNET = Network(
    224,
    (
        *(Conv(64, 11, 4, 2), Pool(3, 2)),
        *(Conv(192, 5, 1, 2), Pool(3, 2)),
        *(Conv(384), Conv(256), Conv(256), Pool(3, 2)),
    ),
)
OVERFEAT = Network(
    221,
    (
        *(Conv(96, 7, 2, 0), Pool(3, 3)),
        *(Conv(256, 7, 1, 0), Pool(2, 2)),
        *(Conv(512), Conv(512), Conv(1024), Conv(1024), Pool(3, 3)),
    ),
)
NETWORKS: dict[str, Callable[[], Network]] = {
    "alexnet": lambda: ALEXNET,
    "overfeat": lambda: OVERFEAT,
    "vgg16": lambda: vgg(0),
    "vgg116": lambda: vgg(100),
    "vgg216": lambda: vgg(200),
    "vgg316": lambda: vgg(300),
    "vgg416": lambda: vgg(400),
}
GOOGLENET = "googlenet"


def paper_names() -> tuple[str, ...]:
    """Names of the paper's networks."""
    return tuple(sorted([*NETWORKS, GOOGLENET]))


def _assemble(name: str, network: Network, image_size: int, width: float) -> FeatureClassifier:
    def scaled(channels: int) -> int:
        return max(1, round(channels * width))

    layers: list[nn.Module] = []
    channels, size = 3, image_size
    for layer in network.layers:
        if isinstance(layer, Conv):
            out = scaled(layer.channels)
            layers.append(nn.Conv2d(channels, out, layer.kernel, layer.stride, layer.padding))
            layers.append(nn.ReLU(inplace=True))
            channels, size = out, (size + 2 * layer.padding - layer.kernel) // layer.stride + 1
        else:
            layers.append(nn.MaxPool2d(layer.kernel, layer.stride))
            size = (size - layer.kernel) // layer.stride + 1
        if size < 1:
            raise UsageError(
                f"{name}: images of {image_size} × {image_size} vanish on the way: use a larger image_size "
                f"(the paper's is {network.image_size})"
            )
    hidden = scaled(network.hidden)
    classifier_layers = nn.Sequential(
        nn.Linear(channels * size * size, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(hidden, CLASSES),
    )
    return FeatureClassifier(nn.Sequential(*layers), classifier_layers)


# -- GoogLeNet -----------------------------------------------------------------------------------


class Inception(nn.Module):
    """Four branches side by side on one input, joined along the channels: 1×1, 3×3, 5×5 and pooling."""

    def __init__(self, channels: int, sizes: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pooled = sizes
        self.branch1 = _conv(channels, one, 1)
        self.branch3 = nn.Sequential(*_conv(channels, reduce3, 1), *_conv(reduce3, three, 3, padding=1))
        self.branch5 = nn.Sequential(*_conv(channels, reduce5, 1), *_conv(reduce5, five, 5, padding=2))
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), *_conv(channels, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.pool(x)], dim=1)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.ReLU(inplace=True))


# 1×1, 3×3 reduce, 3×3, 5×5 reduce, 5×5, pool projection (Szegedy et al., 2015, table 1)
_INCEPTIONS: tuple[tuple[int, int, int, int, int, int] | None, ...] = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    None,  # a POOL layer
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    None,
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)


def _googlenet(width: float) -> FeatureClassifier:
    def scaled(channels: int) -> int:
        return max(1, round(channels * width))

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    stem = scaled(64)
    layers: list[nn.Module] = [_conv(3, stem, 7, 2, 3), pool(), _conv(stem, stem, 1)]
    channels = scaled(192)
    layers += [_conv(stem, channels, 3, padding=1), pool()]
    for sizes in _INCEPTIONS:
        if sizes is None:
            layers.append(pool())
            continue
        one, reduce3, three, reduce5, five, pooled = map(scaled, sizes)
        layers.append(Inception(channels, (one, reduce3, three, reduce5, five, pooled)))
        channels = one + three + five + pooled
    layers.append(nn.AdaptiveAvgPool2d(1))
    return FeatureClassifier(nn.Sequential(*layers), nn.Sequential(nn.Dropout(0.4), nn.Linear(channels, CLASSES)))


# -- by name -------------------------------------------------------------------------------------


def paper_work(model: str, batch: int, given: Mapping[str, object]) -> Work:
    """`paper:NAME`.

    Raises:
        UsageError: no such network, or an option that it does not have.
    """
    if model not in paper_names():
        raise unknown_name("network of the paper", model, paper_names())
    name = f"paper:{model}"
    values = read(name, given, OPTIONS)
    width = values.get("width", 1.0)
    if model == GOOGLENET:
        size = values.get("image_size", 224)
        make: Callable[[], nn.Module] = partial(_googlenet, width)
    else:
        network = NETWORKS[model]()
        size = values.get("image_size", network.image_size)
        make = partial(_assemble, name, network, size, width)
    return classifier(name, batch, identity(values), (3, size, size), make)
