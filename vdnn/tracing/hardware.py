"""Functions that torch would run with other kernels if there were a GPU: attention and recurrent layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from vdnn.tracing import rnn
from vdnn.tracing.attention import attend

__all__ = ["AsOnCuda"]

_REPLACED: dict[Any, Any] = {F.scaled_dot_product_attention: attend, **rnn.REPLACED}


class AsOnCuda(TorchFunctionMode):
    """Sends calls to what CUDA would run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def everywhere(self) -> Iterator[None]:
        """The mode, and the same inside torch's own functions (multi-head attention), which no mode sees."""
        with self, mock.patch.object(F, "scaled_dot_product_attention", attend):
            yield
