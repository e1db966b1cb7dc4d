"""Two small networks for demonstrations on a CPU: every kind of layer that the engine treats in its own way.

* `demo:cnn`: convolution, batch norm, in-place ReLU, a residual fork, pooling, dropout, a linear classifier.
* `demo:transformer`: embedding, pre-norm blocks with causal attention, dropout, a language-model head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdnn.errors import unknown_name
from vdnn.models.options import Option, identity, read, whole
from vdnn.models.vision import CLASSES, classifier
from vdnn.models.work import Work, built, classes, cross_entropy, tokens

__all__ = ["Attention", "Block", "ResidualBlock", "SmallCnn", "SmallTransformer", "demo_names", "demo_work"]

HEAD_SIZE = 32
CNN_OPTIONS = {
    "image_size": Option(whole, "height and width of the images in pixels; 64 if not given"),
    "channels": Option(whole, "channels of the first layer; 32 if not given"),
}
TRANSFORMER_OPTIONS = {
    "sequence": Option(whole, "tokens in a sequence; 128 if not given"),
    "layers": Option(whole, "number of blocks; 4 if not given"),
    "hidden": Option(whole, f"features of a token, a multiple of {HEAD_SIZE}; 128 if not given"),
}
VOCABULARY = CLASSES


class ResidualBlock(nn.Module):
    """Two convolutions and a way around them: (N, C, H, W) → (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        out = self.relu(y + x)
        assert isinstance(out, Tensor)
        return out


class SmallCnn(nn.Module):
    """Stem, two residual stages with pooling, classifier: (N, 3, S, S) → (N, 1000)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.stage1 = ResidualBlock(channels)
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(channels, 2 * channels, 1), nn.ReLU(inplace=True))
        self.stage2 = ResidualBlock(2 * channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(2 * channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stage2(self.down(self.stage1(self.stem(images))))
        logits = self.head(self.dropout(self.pool(x).flatten(1)))
        assert isinstance(logits, Tensor)
        return logits


class Attention(nn.Module):
    """Causal self-attention: (N, L, D) → (N, L, D)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.heads = hidden // HEAD_SIZE
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, HEAD_SIZE).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        out = self.out(y.transpose(1, 2).reshape(batch, length, hidden))
        assert isinstance(out, Tensor)
        return out


class Block(nn.Module):
    """A pre-norm transformer block: (N, L, D) → (N, L, D)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden)
        self.attention = Attention(hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        out = x + self.dropout(self.mlp(self.norm2(x)))
        assert isinstance(out, Tensor)
        return out


class SmallTransformer(nn.Module):
    """A language model: token ids (N, L) → logits (N, L, 1000)."""

    def __init__(self, layers: int, hidden: int, sequence: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, hidden)
        self.positions = nn.Parameter(torch.zeros(sequence, hidden))
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.tokens(ids) + self.positions[: ids.shape[1]])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        assert isinstance(logits, Tensor)
        return logits


def demo_names() -> tuple[str, ...]:
    """Names of the demonstration networks."""
    return ("cnn", "transformer")


def demo_work(model: str, batch: int, given: Mapping[str, object]) -> Work:
    """`demo:cnn` or `demo:transformer`.

    Raises:
        UsageError: no such network, or an option that it does not have.
    """
    if model not in demo_names():
        raise unknown_name("demonstration network", model, demo_names())
    name = f"demo:{model}"
    if model == "cnn":
        values = read(name, given, CNN_OPTIONS)
        size = values.get("image_size", 64)
        return classifier(name, batch, identity(values), (3, size, size), lambda: SmallCnn(values.get("channels", 32)))
    values = read(name, given, TRANSFORMER_OPTIONS)
    return _transformer(name, batch, values)


def _transformer(name: str, batch: int, values: dict[str, Any]) -> Work:
    sequence, layers, hidden = values.get("sequence", 128), values.get("layers", 4), values.get("hidden", 128)

    def make() -> nn.Module:
        if hidden % HEAD_SIZE:
            raise ValueError(f"hidden must be a multiple of the head size {HEAD_SIZE}")
        return SmallTransformer(layers, hidden, sequence)

    return Work(
        name=name,
        batch=batch,
        options=identity(values),
        build=built(name, identity(values), make),
        inputs=lambda device: ((tokens(batch, sequence, VOCABULARY, device),), {}),
        targets=lambda device: classes((batch, sequence), VOCABULARY, device),
        loss=cross_entropy,
    )
