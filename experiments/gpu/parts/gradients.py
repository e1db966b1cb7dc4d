"""Losses, gradients and buffers bit for bit as without offload: first the baseline against itself, then each policy."""

from __future__ import annotations

from typing import Any

import torch

from experiments.gpu.methods import METHODS, OURS, NotHere
from experiments.gpu.session import Session
from experiments.gpu.workloads import Setup, Workload

STEPS = 3


def check(session: Session) -> dict[str, Any]:
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        found: dict[str, Any] = {}
        for workload in session.workloads:
            if session.over():
                found[str(workload)] = {"not_run": "the time was up"}
                continue
            try:
                found[str(workload)] = _compare(session, workload)
            except Exception as error:
                found[str(workload)] = {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
            session.keep(found)
        return found
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[2])
        torch.backends.cudnn.benchmark = before[1]


def _compare(session: Session, workload: Workload) -> dict[str, Any]:
    batch = max(2, workload.options.get("batch", 2) // 16)
    first = _tensors(session, workload, batch, "no offload")
    again = _tensors(session, workload, batch, "no offload")
    if _difference(first, again):
        return {"reproducible": False, "differs": _difference(first, again)}
    found: dict[str, Any] = {"reproducible": True, "tensors": len(first)}
    for policy in OURS:
        try:
            differs = _difference(first, _tensors(session, workload, batch, policy))
            found[policy] = {"exact": not differs, "differs": differs}
        except NotHere as error:
            found[policy] = {"not_run": str(error)}
        except Exception as error:  # the others may still tell something
            found[policy] = {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    return found


def _tensors(session: Session, workload: Workload, batch: int, method: str) -> dict[str, torch.Tensor]:
    setup = Setup(workload, session.device, batch=batch)
    tensors: dict[str, torch.Tensor] = {}
    with METHODS[method](setup) as around:
        for step in range(STEPS):
            torch.manual_seed(1 + step)
            loss = setup.forward(around)
            loss.backward()
            tensors[f"loss {step}"] = loss.detach().clone()
            if step == STEPS - 1:
                for name, parameter in setup.model.named_parameters():
                    if parameter.grad is not None:
                        tensors[f"gradient of {name}"] = parameter.grad.detach().clone()
            setup.finish()
        for name, tensor in (*setup.model.named_parameters(), *setup.model.named_buffers()):
            tensors[f"at the end, {name}"] = tensor.detach().clone()
    session.synchronize()
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> str:
    if left.keys() != right.keys():
        return f"{min(left.keys() ^ right.keys())} is in one run only"
    return next((name for name in left if not torch.equal(left[name], right[name])), "")
