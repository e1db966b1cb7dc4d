"""What the engine can do of a plan's choice of convolution algorithms, and what it cannot.

    fastest, mixed   `torch.backends.cudnn.benchmark` on: cuDNN times its algorithms, within the memory that is free
    least            off: cuDNN's heuristics choose, which is the nearest there is to "no workspace"

PyTorch lets nobody choose an algorithm by layer, and has no limit of its own for their workspace. For a whole process
its documentation names cuDNN's environment variable CUDNN_CONV_WSCAP_DBG; what it does was not tried here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vdnn.values.algorithms import IMPLICIT_GEMM
from vdnn.values.plan import Plan

__all__ = ["choose_in_cudnn", "what_cudnn_does"]


def what_cudnn_does(plan: Plan) -> str:
    """In one sentence, what becomes of the plan's algorithms; "" for a plan that names none."""
    if not plan.workspace:
        return ""
    if plan.workspace == "least":
        return (
            "cuDNN's benchmark is off, so its heuristics choose; that they take no workspace cannot be asked for "
            "(cuDNN's environment variable CUDNN_CONV_WSCAP_DBG caps it for the whole process)"
        )
    said = "cuDNN's benchmark is on: it takes the fastest algorithm that the free memory allows"
    slow = sum(IMPLICIT_GEMM in (choice.forward, choice.backward) for choice in plan.convolutions)
    if plan.workspace == "mixed" and slow:
        said += f"; the algorithm of a layer cannot be set, so the {slow} downgraded ones are cuDNN's choice, too"
    return said


def choose_in_cudnn(plan: Plan) -> Callable[[], None]:
    """Set cuDNN's benchmark as the plan wants it; the function returned sets it back."""
    before = torch.backends.cudnn.benchmark
    if plan.workspace:
        torch.backends.cudnn.benchmark = plan.workspace != "least"

    def undo() -> None:
        torch.backends.cudnn.benchmark = before

    return undo
