"""Bandwidth of pinned copies: each way, and both ways at once."""

from __future__ import annotations

import time
from typing import Any

import torch

from experiments.gpu.session import Session

BYTES, ROUNDS = 1 << 30, 5


def measure(session: Session) -> dict[str, Any]:
    """Bytes a second, best of five; both ways: the sum of the two."""
    if session.virtual:
        return {"skipped": "no link on a CPU"}
    host = [torch.empty(BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    card = [torch.empty(BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def best(out: bool, back: bool) -> float:
        times = []
        for _ in range(ROUNDS):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            if out:
                with torch.cuda.stream(streams[0]):
                    host[0].copy_(card[0], non_blocking=True)
            if back:
                with torch.cuda.stream(streams[1]):
                    card[1].copy_(host[1], non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times)

    session.link = {
        "d2h_bytes_per_s": round(BYTES / best(True, False)),
        "h2d_bytes_per_s": round(BYTES / best(False, True)),
        "duplex_bytes_per_s": round(2 * BYTES / best(True, True)),
    }
    return dict(session.link)
