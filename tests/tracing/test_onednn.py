"""LSTM layers on a CPU: the workspace in a capture is the one that oneDNN makes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vdnn
from vdnn.tracing.onednn import workspace_bytes

RUNS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.aten, "mkldnn_rnn_layer")
pytestmark = pytest.mark.skipif(not RUNS, reason="this torch has no oneDNN")


@pytest.mark.parametrize(
    ("steps", "batch", "features", "hidden"),
    [(1, 1, 1, 1), (2, 1, 64, 128), (50, 16, 64, 100), (10, 8, 512, 256), (7, 20, 650, 650), (5, 3, 20, 1024)],
)
def test_the_workspace_of_an_lstm_is_as_large_as_the_op_makes_it(
    steps: int, batch: int, features: int, hidden: int
) -> None:
    x, state = torch.zeros(steps, batch, features), torch.zeros(1, batch, hidden)
    weights = [torch.zeros(4 * hidden, n) for n in (features, hidden)] + [torch.zeros(4 * hidden)] * 2
    made = torch.ops.aten.mkldnn_rnn_layer(x, *weights, state, state, False, [], 2, hidden, 1, True, False, False, True)
    assert workspace_bytes(steps, batch, features, hidden) == made[3].numel()


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(24, 40, 2, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.rnn(x)[0]
        return out


def test_what_a_captured_lstm_saves_is_what_a_real_one_saves() -> None:
    """oneDNN's workspaces were left out: predictions for a virtual device were too low."""
    torch.manual_seed(0)
    model, x = Both(), torch.randn(3, 9, 24)
    trace = vdnn.capture(model, x, device="cpu", loss=lambda y: y.square().sum())
    sizes: list[int] = []

    def size_of(t: torch.Tensor) -> torch.Tensor:
        sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(size_of, lambda t: t):
        model(x).square().sum()
    assert sorted(t.nbytes for t in trace.saved) == sorted(sizes)
    assert workspace_bytes(9, 3, 80, 40) in sizes
