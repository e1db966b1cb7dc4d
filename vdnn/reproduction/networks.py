"""The networks of the paper's figures: name in the figures → model and batch."""

from __future__ import annotations

__all__ = ["DEEP", "NETWORKS", "POLICIES"]

NETWORKS: dict[str, tuple[str, int]] = {
    "AlexNet(128)": ("paper:alexnet", 128),
    "OverFeat(128)": ("paper:overfeat", 128),
    "GoogLeNet(128)": ("paper:googlenet", 128),
    "VGG-16(64)": ("paper:vgg16", 64),
    "VGG-16(128)": ("paper:vgg16", 128),
    "VGG-16(256)": ("paper:vgg16", 256),
    "VGG-116(32)": ("paper:vgg116", 32),
    "VGG-216(32)": ("paper:vgg216", 32),
    "VGG-316(32)": ("paper:vgg316", 32),
    "VGG-416(32)": ("paper:vgg416", 32),
}
DEEP = tuple(name for name in NETWORKS if name.endswith("(32)"))

# The paper's bars → policies.
POLICIES = {
    "all(m)": "vdnn-all-m",
    "all(p)": "vdnn-all-p",
    "conv(m)": "vdnn-conv-m",
    "conv(p)": "vdnn-conv-p",
    "dyn": "vdnn-dyn",
    "base(m)": "none-m",
    "base(p)": "none-p",
}
