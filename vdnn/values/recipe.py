"""`Recipe`: how a step is run, apart from its model, precision and optimizer. Each part changes what a GPU does.

The defaults are today's PyTorch as most training loops use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from vdnn.errors import UsageError, unknown_name

__all__ = ["USUAL", "Attention", "OptimizerImpl", "Recipe", "StepKind", "ZeroGrad"]

StepKind = Literal["training", "inference"]
Attention = Literal["fused", "math"]
ZeroGrad = Literal["to-none", "in-place"]
OptimizerImpl = Literal["foreach", "for-loop", "fused"]
_SWITCH = {"on": True, "off": False, "true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a step is run.

    step: "training", or "inference": the forward alone, in evaluation mode, without autograd and loss.
    attention: "fused" as scaled_dot_product_attention runs on a GPU, or "math": two products and a softmax, as
        torch before 2.0 and models with their fused attention switched off run it.
    zero_grad: "to-none": gradients are made by each backward; "in-place" (`set_to_none=False`): they stay allocated,
        backward adds to them, and the step ends with setting them to zero.
    optimizer_impl: torch's three: "foreach" (one kernel for many tensors), "for-loop", "fused".
    backward_autocast: backward runs inside the autocast block, too.
    cudnn_benchmark: `torch.backends.cudnn.benchmark`: convolutions take what ran fastest, whatever workspace it needs.
    """

    step: StepKind = "training"
    attention: Attention = "fused"
    zero_grad: ZeroGrad = "to-none"
    optimizer_impl: OptimizerImpl = "foreach"
    backward_autocast: bool = False
    cudnn_benchmark: bool = False

    @staticmethod
    def of(given: Mapping[str, Any]) -> Recipe:
        """A recipe from names and values; on a command line everything is text ("on", "off").

        Raises:
            UsageError: an unknown name or value.
        """
        hints = get_type_hints(Recipe)
        read: dict[str, Any] = {}
        for name, value in given.items():
            if name not in hints:
                raise unknown_name("part of a recipe", name, hints)
            if hints[name] is bool:
                switched = _SWITCH.get(value.lower()) if isinstance(value, str) else value
                if not isinstance(switched, bool):
                    raise UsageError(f"{name}={value} is no switch: write {name}=on or {name}=off")
                read[name] = switched
            else:
                if value not in get_args(hints[name]):
                    raise unknown_name(f"value of {name}", str(value), get_args(hints[name]))
                read[name] = value
        return Recipe(**read)


USUAL = Recipe()
