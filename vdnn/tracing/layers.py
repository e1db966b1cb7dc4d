"""Which kind of layer a module is: vDNN's policies speak of CONV, POOL, ACTV and FC layers."""

from __future__ import annotations

from torch import nn

from vdnn.values import LayerKind

__all__ = ["layer_kind"]

_CLASSES: tuple[tuple[LayerKind, tuple[type[nn.Module], ...]], ...] = (
    ("conv", (nn.modules.conv._ConvNd,)),
    (
        "pool",
        (
            nn.modules.pooling._MaxPoolNd,
            nn.modules.pooling._AvgPoolNd,
            nn.modules.pooling._AdaptiveAvgPoolNd,
            nn.modules.pooling._AdaptiveMaxPoolNd,
            nn.modules.pooling._LPPoolNd,
        ),
    ),
    ("norm", (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)),
    ("dropout", (nn.modules.dropout._DropoutNd,)),
    ("linear", (nn.Linear, nn.Bilinear)),
    ("embedding", (nn.Embedding, nn.EmbeddingBag)),
    ("attention", (nn.MultiheadAttention,)),
    ("rnn", (nn.RNNBase, nn.RNNCellBase)),
)


def layer_kind(module: nn.Module) -> LayerKind:
    """The kind by class; activations are torch's own; a module with parts is a container, the rest is other."""
    for kind, classes in _CLASSES:
        if isinstance(module, classes):
            return kind
    if type(module).__module__ == "torch.nn.modules.activation":
        return "activation"
    name = type(module).__name__
    if any(module.children()):
        return "attention" if name.endswith(("Attention", "SelfAttention")) else "container"
    if name == "Conv1D":  # Hugging Face's GPT-2 calls its linear layer so
        return "linear"
    if name.endswith("Norm") or "Norm2d" in name:
        return "norm"
    if name.endswith(("GELU", "Activation", "GELUActivation")):
        return "activation"
    return "other"
