"""A mixture of experts whose tensors have the same shapes wherever the tokens go.

transformers' default loops over the experts that were hit, with as many tokens each as the router sends: a
fake tensor cannot say how many. Here tokens are sorted by expert and every expert's product runs inside one
op, transformers' own `grouped_mm_fallback`, which has rules for fake tensors and for autograd in every dtype.
The result is the same as the loop's; the op asks the device for the group sizes, once a layer and direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["NAME", "register"]

NAME = "vdnn_grouped"


def register() -> str:
    """Make the implementation known to transformers, under the name that is returned."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, grouped)
    return NAME


def grouped(experts: Any, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Tokens (T, D) through their experts: `chosen` and `weights` are (T, K); returns (T, D)."""
    number, per_token = chosen.shape
    sorted_experts, order = torch.sort(chosen.flatten())
    # a comparison instead of histc or bincount: deterministic on CUDA, and known to fakes
    limits = (sorted_experts[None, :] <= torch.arange(experts.num_experts, device=tokens.device)[:, None]).sum(1)
    product = torch.ops.transformers.grouped_mm_fallback
    x = tokens[order // per_token].to(experts.gate_up_proj.dtype)
    x = experts._apply_gate(product(x, experts.gate_up_proj.transpose(1, 2), limits))
    x = product(x, experts.down_proj.transpose(1, 2), limits)
    x = x * weights.flatten()[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    mixed: Tensor = x[back].view(number, per_token, -1).sum(1).to(tokens.dtype)
    return mixed
