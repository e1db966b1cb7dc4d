"""What an op makes of fake tensors, without asking the fake mode where that is plain: a third of its time or less.

FakeTensorMode takes 0.15 to 2 ms an op: it hashes the arguments, keeps a cache that holds shapes seen before, and
runs decompositions in Python. Of the ops that a step has most of the result is known beforehand:

    a view                          torch's own C++ rule for views, on the fakes' meta tensors
    one of dense tensors alike      the shape, strides and dtype of its arguments; a copy of one
    in place                        its first argument
    cuDNN's batch norm, forward     like its input, and two statistics per channel
    the loss of classes             two numbers, and a gradient like its input

Anything else (other dtypes, broadcasting, constants, subclasses) is None here, and goes to the mode. A test captures
models both ways and compares the traces.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from operator import mul
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["fake_view", "shortcut"]

_ATEN: Any = torch.ops.aten
_C: Any = torch._C
_VIEWS = {
    _ATEN.detach.default,
    _ATEN.t.default,
    _ATEN.transpose.int,
    _ATEN.permute.default,
    _ATEN.view.default,
    _ATEN._unsafe_view.default,
    _ATEN.expand.default,
    _ATEN.unsqueeze.default,
    _ATEN.squeeze.dim,
    _ATEN.slice.Tensor,
    _ATEN.select.int,
    _ATEN.as_strided.default,
}
_ALIKE = {  # tensors among their arguments → how many come first, all of them alike
    _ATEN.add.Tensor: 2,
    _ATEN.mul.Tensor: 2,
    _ATEN.threshold_backward.default: 2,
    _ATEN.relu.default: 1,
}
# the loss of classes, forward and backward → where log-probabilities, weights and reduction are among its arguments
_LOSSES = {_ATEN.nll_loss_forward.default: (0, 2, 3), _ATEN.nll_loss_backward.default: (1, 3, 4)}
_IN_PLACE = {_ATEN.add_.Tensor: 2, _ATEN.relu_.default: 1, _ATEN.mul_.Tensor: 2}


def shortcut(mode: FakeTensorMode, func: Any, args: Any, kwargs: Any) -> Any:
    """The op's result, or None where it is not plain."""
    if kwargs or not args:
        return None
    first = args[0]
    if type(first) is not FakeTensor or first.fake_mode is not mode or first.constant is not None:
        return None
    if func in _VIEWS:
        return FakeTensor(mode, _on_meta(mode, func, args), first.fake_device)
    if func is _ATEN.cudnn_batch_norm.default:
        return _batch_norm(mode, args)
    if func is _ATEN.cudnn_batch_norm_backward.default:
        return _batch_norm_backward(mode, args)
    if func in _LOSSES:
        given, weight, reduction = (args[i] for i in _LOSSES[func])
        return _nll_loss(mode, given, weight, reduction, func is _ATEN.nll_loss_backward.default)
    if func is _ATEN.clone.default:
        dense = torch._prims_common.is_non_overlapping_and_dense_or_false(first)
        return _like(mode, first, first.shape, first.stride(), first.dtype) if dense else None
    count = _ALIKE.get(func)
    if count is not None:
        if _alike(args[:count]) and (strides := _output_strides(first)) is not None:
            return _like(mode, first, first.shape, strides, first.dtype)
        if _alike(args[:count], strides=False) and all(map(_descending, args[:count])):
            return _like(mode, first, first.shape, _contiguous(first.shape), first.dtype)
        return None
    count = _IN_PLACE.get(func)
    if count is not None and _alike(args[:count]):
        return first
    return None


def fake_view(
    mode: FakeTensorMode, storage: torch.UntypedStorage | int, device: torch.device, dtype: torch.dtype,
    offset: int, shape: Any, stride: Any,
) -> torch.Tensor:  # fmt: skip
    """A fake tensor in a fake storage, or in a new one of so many bytes."""
    with _C._DisableTorchDispatch():
        if isinstance(storage, int):
            storage = torch.empty(storage, dtype=torch.uint8, device="meta").untyped_storage()
        tensor = torch.empty(0, dtype=dtype, device="meta")
        tensor.set_(storage, offset, shape, stride)
    return FakeTensor(mode, tensor, device)


def _alike(tensors: Any, strides: bool = True) -> bool:
    first = tensors[0]
    return all(
        other is first
        or (
            type(other) is FakeTensor
            and other.constant is None
            and other.dtype is first.dtype
            and other.fake_device == first.fake_device
            and other.shape == first.shape
            and (not strides or other.stride() == first.stride())
        )
        for other in tensors[1:]
    )


def _output_strides(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Strides of what is made from dense tensors with these strides; None where the order of dimensions is unclear.

    torch writes those of dimensions of size 1 anew, by rules of its own where the tensor is not contiguous.
    """
    if tensor.is_contiguous():
        return _contiguous(tensor.shape)
    if 1 in tensor.shape or not torch._prims_common.is_non_overlapping_and_dense_or_false(tensor):
        return None
    return tensor.stride()


def _descending(tensor: torch.Tensor) -> bool:
    """Every stride less than the one before: TensorIterator then keeps the order, and its output is contiguous."""
    strides = tensor.stride()
    return bool(strides) and strides[-1] > 0 and all(a > b for a, b in pairwise(strides))


def _contiguous(shape: Any) -> tuple[int, ...]:
    """Strides of a contiguous tensor; a dimension of none counts as one, and a number has none."""
    if not shape:
        return ()
    return tuple(accumulate((max(n, 1) for n in reversed(shape[1:])), mul, initial=1))[::-1]


def _on_meta(mode: FakeTensorMode, func: Any, args: Any) -> torch.Tensor:
    """The op on the meta tensors behind the fakes, as the mode itself runs kernels."""
    with _C._DisableTorchDispatch():
        mode.in_kernel_invocation = True
        with _C._PreserveDispatchKeyGuard():
            _C._set_meta_in_tls_dispatch_include(True)
            try:
                made: torch.Tensor = func(*args)
                return made
            finally:
                mode.in_kernel_invocation = False


def _batch_norm(mode: FakeTensorMode, args: Any) -> Any:
    x, training = args[0], args[5]
    strides = _output_strides(x)
    if strides is None:
        return None
    channels = (x.shape[1] if training else 0,)
    statistics = [_like(mode, x, channels, (1,), torch.float32) for _ in range(2)]
    return _like(mode, x, x.shape, strides, x.dtype), *statistics, _like(mode, x, (0,), (1,), torch.uint8)


def _batch_norm_backward(mode: FakeTensorMode, args: Any) -> Any:
    x, grad, weight = args[:3]
    strides = _output_strides(x)
    if strides is None or not _alike((x, grad)) or type(weight) is not FakeTensor:
        return None
    of_weight = [_like(mode, x, (x.shape[1],), (1,), weight.dtype) for _ in range(2)]
    return _like(mode, x, x.shape, strides, x.dtype), *of_weight


def _nll_loss(mode: FakeTensorMode, given: Any, weight: Any, reduction: int, backward: bool) -> Any:
    """The loss and the sum of weights, or the gradient. The mode would import torch.distributed for a sum in it."""
    if type(given) is not FakeTensor or weight is not None or reduction not in (1, 2) or given.dim() != 2:
        return None
    if backward:
        return _like(mode, given, given.shape, _contiguous(given.shape), given.dtype)
    return tuple(_like(mode, given, (), (), given.dtype) for _ in range(2))


def _like(mode: FakeTensorMode, given: FakeTensor, shape: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    with _C._DisableTorchDispatch():
        made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return FakeTensor(mode, made, given.fake_device)
