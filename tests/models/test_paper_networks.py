"""The paper's networks are the paper's: their CONV and POOL layers read the bytes that its figure 12 shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vdnn.models import load


def read_bytes(name: str, batch: int) -> tuple[int, int]:
    """Bytes of the different feature maps that (CONV and POOL, CONV) layers read in one forward."""
    work = load(f"paper:{name}", batch=batch)
    found: dict[tuple[int, bool], int] = {}
    alive: list[torch.Tensor] = []  # keeps identities apart

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        alive.append(x)
        key = x.untyped_storage()._cdata
        found[key, isinstance(module, nn.Conv2d)] = x.nbytes

    with FakeTensorMode(), torch.device("cuda"):
        model = work.build()
        for module in model.features.modules():
            if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AdaptiveAvgPool2d):
                module.register_forward_pre_hook(note)
        args, _ = work.inputs("cuda")
        model(*args)
    every = {key: size for (key, _), size in found.items()}
    return sum(every.values()), sum(size for (_, conv), size in found.items() if conv)


@pytest.mark.parametrize(
    ("name", "batch", "everything", "conv"),
    [
        ("alexnet", 128, 349, 165),
        ("googlenet", 128, 2341, 1367),
        ("vgg16", 64, 4030, 2536),
        ("vgg16", 256, 16121, 10143),
    ],
)
def test_feature_maps_that_the_paper_offloads(name: str, batch: int, everything: int, conv: int) -> None:
    total_bytes, conv_bytes = read_bytes(name, batch)
    assert round(total_bytes / 2**20) == everything
    assert round(conv_bytes / 2**20) == conv


def test_deep_vgg_reads_what_figure_15_says() -> None:
    assert round(read_bytes("vgg116", 32)[0] / 2**20) == 16960


@pytest.mark.parametrize(("name", "conv_layers"), [("vgg16", 16), ("vgg116", 116), ("vgg416", 416)])
def test_vgg_has_the_named_number_of_conv_layers_in_groups(name: str, conv_layers: int) -> None:
    with FakeTensorMode():
        model = load(f"paper:{name}", batch=1).build()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == conv_layers
    more = (conv_layers - 16) // 5
    depths = [sum(m.out_channels == c for m in layers) for c in (64, 128, 256, 512)]
    assert depths == [2 + more, 2 + more, 4 + more, 8 + 2 * more]
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 3
    assert all(m.inplace for m in model.modules() if isinstance(m, nn.ReLU))


def test_the_paper_s_vgg_has_as_many_weights_as_configuration_e() -> None:
    with FakeTensorMode():
        model = load("paper:vgg16", batch=1).build()
    assert sum(p.numel() for p in model.parameters()) == 143_667_240
