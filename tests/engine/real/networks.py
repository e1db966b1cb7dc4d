"""The networks of the sweep: every torchvision classifier, members of timm families, every `hf:` configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vdnn
from tests.engine.real.comparing import Case, Training
from vdnn.models.hf import hf_names
from vdnn.models.vision import torchvision_names

__all__ = ["network", "networks"]

BATCH = 2
# Above this number of parameters the optimizer has no momentum: that would be memory for nothing here.
LARGE = 150_000_000

# Smallest images that the network takes and stays finite with in three steps; 32 pixels are enough for the others.
SIZES = {
    "efficientnet_b3": 64,
    "efficientnet_b4": 64,
    "efficientnet_v2_l": 64,
    "regnet_x_400mf": 64,
    "alexnet": 64,
    "inception_v3": 299,
    "maxvit_t": 224,
    "vit_h_14": 56,
    "squeezenet1_0": 64,
    "squeezenet1_1": 64,
}

# One small member of each family, with the image size it takes.
TIMM: dict[str, int] = {
    "beit_base_patch16_224": 32,
    "botnet26t_256": 64,
    "cait_xxs24_224": 32,
    "coat_tiny": 64,
    "coatnet_nano_rw_224": 64,
    "convit_tiny": 32,
    "convmixer_768_32": 32,
    "convnextv2_atto": 32,
    "crossvit_tiny_240": 240,
    "cspresnet50": 32,
    "davit_tiny": 64,
    "deit3_small_patch16_224": 32,
    "densenet121": 32,
    "dla34": 32,
    "dpn48b": 32,
    "edgenext_xx_small": 64,
    "efficientformer_l1": 224,
    "efficientnet_lite0": 32,
    "efficientvit_b0": 64,
    "eva02_tiny_patch14_224": 56,
    "fasternet_t0": 64,
    "fastvit_t8": 64,
    "focalnet_tiny_srf": 64,
    "ghostnet_100": 32,
    "hgnetv2_b0": 64,
    "hrnet_w18_small": 64,
    "inception_next_atto": 64,
    "levit_128s": 224,
    "mambaout_femto": 64,
    "mixer_s32_224": 64,
    "mobilenetv4_conv_small": 32,
    "mobilevit_xxs": 64,
    "mvitv2_tiny": 64,
    "nf_resnet50": 32,
    "nfnet_l0": 32,
    "pit_ti_224": 224,
    "poolformer_s12": 64,
    "pvt_v2_b0": 64,
    "regnetx_002": 32,
    "repvgg_a0": 32,
    "repvit_m0_9": 64,
    "res2net50_14w_8s": 32,
    "resnest14d": 64,
    "resnetv2_50": 32,
    "rexnet_100": 32,
    "seresnet50": 32,
    "sequencer2d_s": 64,
    "skresnet18": 32,
    "starnet_s1": 32,
    "swiftformer_xs": 64,
    "swinv2_cr_tiny_224": 64,
    "tiny_vit_5m_224": 224,
    "tnt_s_patch16_224": 32,
    "twins_svt_small": 64,
    "visformer_tiny": 224,
    "volo_d1_224": 64,
    "xception41": 64,
    "xcit_nano_12_p16_224": 64,
}  # fmt: skip

SCALED: dict[str, Any] = {"layers": 2, "hidden": 128, "sequence": 32, "vocabulary": 101}


def networks() -> list[tuple[str, dict[str, Any]]]:
    """Names and options, as `vdnn.load` takes them."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name in torchvision_names():
        found.append((f"torchvision:{name}", {"image_size": SIZES.get(name, 32)}))
    found += [(f"timm:{name}", {"image_size": size}) for name, size in TIMM.items()]
    for name in hf_names():
        options = dict(SCALED)
        if name.startswith("vit"):
            options = {"layers": 2, "hidden": 128, "image_size": 32}
        found.append((f"hf:{name}", options))
    return found


def network(name: str, options: dict[str, Any]) -> Case:
    """Three steps of SGD on one batch."""

    def make(kind: str) -> Training:
        work = vdnn.load(name, batch=BATCH, **options)
        model = work.build().to(kind)
        args, kwargs = work.inputs(kind)
        targets = work.targets(kind)
        large = sum(p.numel() for p in model.parameters()) > LARGE
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.0 if large else 0.9)

        def step(number: int) -> list[Tensor]:
            optimizer.zero_grad()
            output = model(*args, **kwargs)
            loss = work.loss(output, targets)
            loss.backward()
            optimizer.step()
            logits = output if isinstance(output, Tensor) else output[1] if name.startswith("hf:") else output[0]
            return [loss.detach(), logits.detach()]

        return Training({"model": model}, step)

    return Case(name, make)
