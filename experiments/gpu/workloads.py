"""What is run: networks in the precision that people use for each, and one training step of each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import vdnn
from vdnn.models import Work

__all__ = ["SMALL", "WORKLOADS", "Setup", "Workload"]

AUTOCAST = {"amp": torch.float16, "amp-bf16": torch.bfloat16}


@dataclass(frozen=True)
class Workload:
    """A network by its name for `vdnn.load`, with options, and the precision it is trained in."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"

    def load(self, **changes: Any) -> Work:
        return vdnn.load(self.name, **{**self.options, **changes})

    def __str__(self) -> str:
        return f"{self.name}({self.options.get('batch', 1)}) {self.precision}"


WORKLOADS = (
    Workload("hf:gpt2-medium", {"batch": 8, "sequence": 1024}, "amp-bf16"),
    Workload("paper:vgg16", {"batch": 128}),
    Workload("torchvision:resnet50", {"batch": 256}, "amp-bf16"),
    Workload("torchvision:vit_l_16", {"batch": 64}, "amp-bf16"),
    Workload("hf:llama-8b", {"batch": 2, "sequence": 4096, "layers": 8, "vocabulary": 32000}, "bf16"),
)
# The same path on a CPU, in seconds.
SMALL = (
    Workload("paper:vgg16", {"batch": 2, "image_size": 64, "width": 0.125}),
    Workload("hf:gpt2", {"batch": 2, "sequence": 16, "layers": 2, "hidden": 32, "vocabulary": 101}),
    Workload("torchvision:resnet18", {"batch": 2, "image_size": 64}),
)


class Setup:
    """A built network with its inputs and optimizer on one device. A method may replace `model`."""

    def __init__(self, workload: Workload, device: torch.device, optimizer: bool = True, **changes: Any) -> None:
        self.workload = workload
        self.device = device
        self.work = workload.load(**changes)
        torch.manual_seed(0)
        with device:
            self.model: nn.Module = self.work.build()
        if workload.precision == "bf16":
            self.model.bfloat16()
        self.args, self.kwargs = self.work.inputs(device)
        if workload.precision == "bf16":
            self.args = tuple(_lowered(x) for x in self.args)
            self.kwargs = {key: _lowered(x) for key, x in self.kwargs.items()}
        self.targets = self.work.targets(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9) if optimizer else None

    def forward(self, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Tensor:
        """The loss; `around` is open during forward alone."""
        dtype = AUTOCAST.get(self.workload.precision)
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None), around():
            return self.work.loss(self.model(*self.args, **self.kwargs), self.targets)

    def finish(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def step(self, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self.forward(around).backward()
        self.finish()


def _lowered(x: Any) -> Any:
    return x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x
