"""Memory that a CUDA kernel takes while it runs and no op shows: copies of tensors that lie as it cannot read them.

cuDNN's convolutions and batch norms, and torch's own kernels for norms, pooling and softmax, call `contiguous` on what
they are given: a chunk of the channels, a permuted image, an expanded gradient is copied first, and the copy is freed
when the kernel has been issued (aten/src/ATen/native/cudnn/ConvShared.cpp, BatchNorm.cpp, native/cuda/*.cu). A fake
tensor's kernel makes none.
"""

from __future__ import annotations

import torch

__all__ = ["SAID", "hidden_copies"]

SAID = "copies that CUDA's kernels make of tensors that are not contiguous, as workspaces of their ops"

_COPYING = ("convolution", "batch_norm", "layer_norm", "group_norm", "softmax", "pool2d", "pool3d")


def hidden_copies(name: str, tensors: list[torch.Tensor]) -> int:
    """Bytes of the tensors that an aten op must copy before its kernel can read them."""
    if not any(part in name for part in _COPYING):
        return 0
    # a convolution runs in NHWC if one of its tensors lies so, the others in the layout of their first
    looked_at = tensors if "convolution" in name else tensors[:1]
    nhwc = any(
        t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in looked_at
    )
    copied = 0
    for tensor in tensors:
        form = torch.channels_last if nhwc and tensor.dim() == 4 else torch.contiguous_format
        if tensor.dim() > 1 and not tensor.is_contiguous(memory_format=form):
            copied += tensor.numel() * tensor.element_size()
    return copied
