"""Losses for a model whose own is not known: what the step of a training loop will need for one.

summed_loss     of every floating tensor: saves nothing, and takes next to no memory
likely_loss     what a loop most probably does: the model's own loss, or a cross entropy of its outputs
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from vdnn.errors import UsageError

__all__ = ["likely_loss", "summed_loss"]


def summed_loss(output: Any) -> torch.Tensor:
    """The sum of every floating tensor in a model's output.

    Raises:
        UsageError: there is none that needs a gradient.
    """
    return _total([t.float().sum() for t in _trained(output)])


def likely_loss(output: Any) -> torch.Tensor:
    """The "loss" of an output that has one, as Hugging Face's do; else a cross entropy of each tensor.

    A cross entropy is the dearest of the usual losses: in 32 bits it saves a tensor of the output's size and has two
    more in backward. For memory it makes no difference which dimension the classes are in.

    Raises:
        UsageError: the output has no floating tensor that needs a gradient.
    """
    own = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(own, torch.Tensor) and own.requires_grad:
        return own
    return _total([_cross_entropy(t) if t.numel() > 1 else t.float().sum() for t in _trained(output)])


def _cross_entropy(tensor: torch.Tensor) -> torch.Tensor:
    rows = tensor.float().reshape(-1, tensor.shape[-1])
    return F.cross_entropy(rows, torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device))


def _total(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(parts).sum() if len(parts) > 1 else parts[0]


def _trained(output: Any) -> list[torch.Tensor]:
    found = [t for t in _tensors(output) if t.is_floating_point() and t.requires_grad]
    if not found:
        raise UsageError("the model's output has no floating tensor that needs a gradient: there is nothing to train")
    return found


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, dict):  # Hugging Face's outputs are dicts, but no pytrees
        return [t for value in output.values() for t in _tensors(value)]
    if isinstance(output, list | tuple):
        return [t for value in output for t in _tensors(value)]
    if is_dataclass(output) and not isinstance(output, type):
        return [t for part in fields(output) for t in _tensors(getattr(output, part.name))]
    return [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
