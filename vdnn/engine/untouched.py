"""What the engine leaves where it is: parameters, buffers, and what a rule does not take."""

from __future__ import annotations

import torch
from torch import nn

from vdnn.calls import Frame
from vdnn.engine.device import is_plain
from vdnn.engine.schedule import Rule

__all__ = ["belongs", "by_rule", "storage_keys"]


def storage_keys(model: nn.Module) -> set[int]:
    """The storages of a model's parameters and buffers, by address of the storage object."""
    return {
        tensor.untyped_storage()._cdata
        for tensor in (*model.parameters(), *model.buffers())
        if is_plain(tensor) and not tensor.is_meta
    }


def belongs(frame: Frame, storage: torch.UntypedStorage) -> bool:
    """Whether it is a parameter of the module that runs: some are made anew for each forward."""
    for parameter in frame.module._parameters.values():
        if parameter is not None and is_plain(parameter) and parameter.untyped_storage() is storage:
            return True
    return False


def by_rule(rule: Rule, frame: Frame, tensor: torch.Tensor) -> bool:
    """Whether the rule takes a saved tensor that no plan knows."""
    if tensor.nbytes < rule.min_bytes:
        return False
    if isinstance(frame.module, nn.RReLU):
        return False  # its op saves the noise first and draws it then
    if rule.types and not isinstance(frame.module, rule.types):
        return False
    # autocast's low-precision copy of a weight is no feature map: the layer casts it once a step for all
    for parameter in frame.module._parameters.values():
        if parameter is not None and parameter.dtype != tensor.dtype and parameter.numel() == tensor.numel():
            return False
    return True
