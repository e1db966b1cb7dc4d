"""Attention as the hardware would run it: without a GPU torch falls back to the math kernel, CUDA would not.

Flash where dtype and head size allow and there is no mask; else memory-efficient; the choice that CUDA's
dispatcher makes on GPUs from Ampere on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["SAID", "attend"]

SAID = "attention kernel chosen as CUDA would: flash, or memory-efficient with a mask or in fp32"

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
