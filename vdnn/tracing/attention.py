"""Attention as the hardware would run it: without a GPU torch falls back to the math kernel, CUDA would not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["HardwareAttention"]

_DISPATCHED: Any = F.scaled_dot_product_attention
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_HEAD = 256  # largest head size of the flash kernels


class HardwareAttention(TorchFunctionMode):
    """Sends `F.scaled_dot_product_attention` on fake CUDA tensors to the flash or the memory-efficient kernel.

    Flash where dtype and head size allow and there is no mask; else memory-efficient; the choice that CUDA's
    dispatcher makes on GPUs from Ampere on.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return _attend(*args, **kwargs) if func is _DISPATCHED else func(*args, **kwargs)

    @contextlib.contextmanager
    def everywhere(self) -> Iterator[None]:
        """The mode, and the same inside torch's own functions (multi-head attention), which no mode sees."""
        with self, mock.patch.object(F, "scaled_dot_product_attention", _attend):
            yield


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
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
