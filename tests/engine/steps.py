"""Training steps of small models, with the engine and without: what they give, and whether it is the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import vdnn
from vdnn.policies import Options, decide
from vdnn.values import Plan, Recompute, hardware

GPU = hardware("rtx4090")
EVERYTHING = Options(min_bytes=1, keep_soon=False)


def trained(model: nn.Module, x: torch.Tensor, steps: int = 3) -> list[torch.Tensor]:
    """Outputs, gradients and a random number after each step, and the buffers at the end."""
    found = []
    for number in range(steps):
        torch.manual_seed(number)
        model.zero_grad()
        x.grad = None
        out = model(x)
        outs = out if isinstance(out, tuple) else (out,)
        torch.stack([o.square().mean() for o in outs]).sum().backward()
        grads = [p.grad for p in (*model.parameters(), x) if p.grad is not None]
        found += [*(t.detach().clone() for t in (*outs, *grads)), torch.rand(1)]
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.01 * p.grad
    return [*found, *(b.clone() for b in model.buffers())]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Bit for bit, NaN included."""
    return all(a.dtype is b.dtype and torch.equal(_bytes(a), _bytes(b)) for a, b in zip(ours, theirs, strict=True))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).clone().view(torch.uint8)


def planned(model: nn.Module, x: torch.Tensor, policy: str) -> Plan:
    """A policy's plan for a step on a virtual device, whatever the sizes."""
    return decide(policy, vdnn.capture(model, x, device="cpu"), GPU, EVERYTHING)


def again(plan: Plan) -> list[Recompute]:
    """What a plan computes again."""
    return [entry.action for entry in plan.entries if isinstance(entry.action, Recompute)]


def or_error(run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor] | str:
    """What it gives, or how its error begins."""
    try:
        return run()
    except RuntimeError as error:
        return str(error).split(":")[0]
