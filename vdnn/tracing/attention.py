"""Attention as the hardware would run it: without a GPU torch falls back to the math kernel, CUDA would not.

Flash where dtype and head size allow and there is no mask; else memory-efficient; the choice that CUDA's
dispatcher makes on GPUs from Ampere on.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

__all__ = ["SAID", "SAID_MATH", "attend", "attend_in_parts", "unfused"]

SAID = "attention kernel chosen as CUDA would: flash, or memory-efficient with a mask or in fp32"
SAID_MATH = "attention as two products and a softmax: fused attention is off"

FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_HEAD = 256  # largest head size of the flash kernels


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    lead = query.shape[:-3]
    if query.dim() != 4:
        query, key, value = (t.reshape(-1, *t.shape[-3:]) if t.dim() > 4 else t[None] for t in (query, key, value))
    aten: Any = torch.ops.aten
    out: torch.Tensor
    if attn_mask is None and query.dtype in FLASH_DTYPES and query.shape[-1] <= FLASH_HEAD:
        padded = -query.shape[-1] % 8
        if padded:
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            query, key, value = (F.pad(t, (0, padded)) for t in (query, key, value))
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        out = out[..., : out.shape[-1] - padded] if padded else out
    else:
        bias = attn_mask
        if bias is not None:
            if bias.dtype is torch.bool:
                bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(bias.logical_not(), float("-inf"))
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        out = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )[0]
    return out.reshape(*lead, *out.shape[-3:]) if len(lead) != 1 else out


def attend_in_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention as models wrote it before there was a fused one; autocast casts each part as it does there."""
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
        else:
            scores = scores + attn_mask
    weights = scores.softmax(-1)
    return F.dropout(weights, dropout_p) @ value


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """timm's models ask once, when they are built, whether to use the fused attention: they hear no."""
    config = sys.modules.get("timm.layers.config")
    if config is None:
        yield
        return
    with mock.patch.object(config, "_USE_FUSED_ATTN", 0):
        yield
