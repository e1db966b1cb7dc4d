"""LSTM layers on a CPU: the workspace that oneDNN's forward leaves for backward, of which torch's fakes know nothing.

It is five matrices of states, the gates and the outputs of every time step, each from a page on (oneDNN 3,
src/cpu/rnn/rnn_utils.cpp: `set_offsets`, `get_good_ld`). A row is whole cache lines, and one more where it would be a
multiple of 1 KiB, so that rows do not share a set of the cache. A test compares it with the op itself.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["RULES", "workspace_bytes"]

_ATEN: Any = torch.ops.aten
_FLOAT = 4
_LINE = 64 // _FLOAT  # floats
_PAGE = 4096
_LSTM = 2  # torch's number of the mode
_GATES = 4


def workspace_bytes(steps: int, batch: int, features: int, hidden: int) -> int:
    """Of one layer in one direction, in fp32."""
    longest = _row(max(features, hidden))
    rows = 2 * (steps + 1) * batch  # what goes in and what comes out, from the state before the first step on
    return (
        _pages(steps * batch * _row(_GATES * hidden))
        + 3 * _pages(rows * longest)
        + 2 * _pages(rows * hidden)
        + _pages(steps * batch * _row(hidden))
    )


def _row(floats: int) -> int:
    lines = -(-floats // _LINE) * _LINE
    return lines + _LINE if lines % 256 == 0 else lines


def _pages(floats: int) -> int:
    return -(-floats * _FLOAT // _PAGE) * _PAGE


def _forward(args: tuple[Any, ...]) -> Any:
    out, hy, cy, workspace = _ATEN.mkldnn_rnn_layer.default(*args)
    x, mode, hidden, train = args[0], args[9], args[10], args[15]
    if train and mode == _LSTM and x.dtype is torch.float32:
        steps, batch, features = x.shape
        workspace = x.new_empty(workspace_bytes(steps, batch, features, hidden), dtype=torch.uint8)
    return out, hy, cy, workspace


RULES: dict[Any, Any] = {_ATEN.mkldnn_rnn_layer.default: _forward}
