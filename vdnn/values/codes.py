"""Codes: how little of a saved storage is enough for the nodes that read it, with every bit of every gradient.

    sign       1 bit an element: `not (y <= 0)`, so a NaN counts as positive, as in `threshold_backward`
    positive   1 bit an element: `x > 0`, so a NaN does not, as in `leaky_relu_backward`
    bits       1 bit an element of a bool tensor: exact, whoever reads it
    index8     1 byte (index16: 2) for each int64 index that a MaxPool2d keeps: its place in the window; exact
    shape      nothing: only form and dtype are asked for (the input of a pooling layer)

What comes back from `bits` and the indices is the same bytes. From the others it is a tensor of the same form in which
only what the code keeps is right: so the node that reads the tensor must allow the code (`READERS`), which is checked
again where it is asked for. A convolution that saves the storage, too, needs its values. (Gist, ISCA 2018.)
"""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["CODES", "ITEM_BYTES", "READERS", "Code", "allows", "code_bytes", "exact", "fits", "restored_bytes"]

Code = Literal["sign", "positive", "bits", "index8", "index16", "shape"]
CODES: tuple[str, ...] = get_args(Code)

# Bytes of an element, of the dtypes that have a code.
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "bool": 1}
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_SHAPE = ("MaxPool2DWithIndicesBackward0", "AvgPool2DBackward0", "AdaptiveAvgPool2DBackward0")
# The nodes that a code is enough for; None: any. PyTorch's kernels of these read no more of the tensor: on the CPU
# cpu/Activation.cpp, cpu/MaxPoolKernel.cpp, cpu/AvgPoolKernel.cpp, cpu/AdaptiveAvgPoolKernel.cpp, on CUDA
# cuda/ActivationThresholdKernel.cu, cuda/ActivationLeakyReluKernel.cu, cuda/DilatedMaxPool2d.cu, cuda/AveragePool2d.cu,
# cuda/AdaptiveAveragePooling.cu, all in aten/src/ATen/native.
READERS: dict[Code, tuple[str, ...] | None] = {
    "sign": ("ReluBackward0", *_SHAPE),
    "positive": ("LeakyReluBackward0", "LeakyReluBackward1", *_SHAPE),
    "bits": None,
    "index8": None,
    "index16": None,
    "shape": _SHAPE,
}


def allows(code: Code, node: str) -> bool:
    """Whether the code keeps all that this autograd node reads of the tensor."""
    readers = READERS[code]
    return readers is None or node in readers


def exact(code: Code) -> bool:
    """Whether the same bytes come back, whoever reads them."""
    return READERS[code] is None


def fits(code: Code, dtype: str) -> bool:
    """Whether there is such a code of this dtype."""
    return dtype in {"bits": ("bool",), "index8": ("int64",), "index16": ("int64",)}.get(code, _FLOATS)


def code_bytes(code: Code, elements: int) -> int:
    """Bytes that stay of a storage of that many elements."""
    if code in ("sign", "positive", "bits"):
        return -(-elements // 8)
    return elements * {"index8": 1, "index16": 2, "shape": 0}[code]


def restored_bytes(code: Code, elements: int, itemsize: int) -> int:
    """Bytes of what is made from the code: for bits, whole bytes of the code are unpacked."""
    return (8 * code_bytes(code, elements) if code in ("sign", "positive", "bits") else elements) * itemsize
