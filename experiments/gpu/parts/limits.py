"""With less memory than the batch takes: it runs out without offload, and trains with it."""

from __future__ import annotations

import gc
from typing import Any

import torch

import vdnn
from experiments.gpu.session import Session
from experiments.gpu.workloads import Setup, Workload

# Decimal GB, a network and batch that takes more
TIGHT = (
    (12, Workload("paper:vgg16", {"batch": 128})),
    (24, Workload("torchvision:resnet50", {"batch": 320}, "amp-bf16")),
)


def check(session: Session) -> list[dict[str, Any]]:
    if session.virtual:
        return [{"skipped": "no CUDA allocator on a CPU; the tests train on a virtual device of limited memory"}]
    total = torch.cuda.get_device_properties().total_memory
    rows: list[dict[str, Any]] = []
    for gigabytes, workload in TIGHT:
        row: dict[str, Any] = {"limit_bytes": gigabytes * 10**9, "model": str(workload)}
        rows.append(row)
        for policy in ("", "vdnn-all", "by budget"):
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 10**9 / total))
            try:
                row[policy or "no offload"] = _steps(session, workload, policy, gigabytes * 10**9)
            except torch.OutOfMemoryError as error:
                row[policy or "no offload"] = {"out_of_memory": str(error).split(". ")[0]}
            except Exception as error:
                row[policy or "no offload"] = {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
            session.keep(rows)
    return rows


def _steps(session: Session, workload: Workload, policy: str, limit: int) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()
    setup = Setup(workload, session.device)
    if policy == "by budget":
        vdnn.wrap(setup.model, budget=limit, optimizer="sgd")
    elif policy:
        vdnn.wrap(setup.model, policy=policy, optimizer="sgd")
    for _ in range(3):
        setup.step()
    torch.cuda.synchronize()
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "decided": vdnn.report(setup.model).policy if policy else "",
    }
