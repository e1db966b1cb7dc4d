"""A real device by its name: its preset, and its memory. `vdnn.measuring` measures what it can do."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from vdnn.values import Hardware, hardware

__all__ = ["available_bytes", "recognised"]

# The first that a device's name matches; longer names before the names they contain.
_NAMES = (
    (r"GH200", "gh200"),
    (r"B200", "b200"),
    (r"H200", "h200"),
    (r"H100 PCIe", "h100-pcie"),
    (r"H100", "h100"),
    (r"A100.*80.*PCIe|A100.*PCIe.*80", "a100-80-pcie"),
    (r"A100.*PCIe|A100.*PCIE", "a100-40-pcie"),
    (r"A100.*80", "a100-80"),
    (r"A100", "a100-40"),
    (r"A10G", "a10g"),
    (r"RTX 5090\b(?! (Laptop|D))", "rtx5090"),
    (r"RTX 4090\b(?! (Laptop|D))", "rtx4090"),
    (r"RTX 3090\b(?! Ti)", "rtx3090"),
    (r"\bL4\b", "l4"),
    (r"\bT4\b", "t4"),
    (r"V100.*PCI[eE]", "v100-pcie"),
    (r"V100", "v100"),
    (r"P100", "p100"),
    (r"\bP4\b", "p4"),
    (r"GTX TITAN X", "titan-x"),
)


def recognised(name: str, memory_bytes: int) -> Hardware | None:
    """The preset of a device by the name its driver gives, with the memory it really has; None if there is none."""
    for pattern, gpu in _NAMES:
        if re.search(pattern, name):
            return replace(hardware(gpu), memory_bytes=memory_bytes)
    return None


def available_bytes(index: int) -> int:
    """Bytes that this process can have on a CUDA device: what is free, and what torch's allocator holds."""
    free, _ = torch.cuda.mem_get_info(index)
    return int(free) + int(torch.cuda.memory_reserved(index))
