"""A history of the real caching allocator, for `vdnn replay`: the one thing that no other machine can give."""

from __future__ import annotations

import gzip
import pickle
from typing import Any

import torch

from experiments.gpu.methods import METHODS
from experiments.gpu.session import Session
from experiments.gpu.workloads import SMALL, Setup
from vdnn.errors import VdnnError


def record(session: Session) -> dict[str, Any]:
    if session.virtual:
        return {"skipped": "no CUDA allocator on a CPU"}
    from vdnn.replay import replay_snapshot
    from vdnn.snapshots import read_snapshot

    found: dict[str, Any] = {}
    for method in ("no offload", "vdnn-all"):
        torch.cuda.empty_cache()
        torch.cuda.memory._record_memory_history(max_entries=200_000, stacks="python", context=None)
        try:
            setup = Setup(SMALL[2], session.device)
            with METHODS[method](setup) as around:
                for _ in range(2):
                    setup.step(around)
            torch.cuda.synchronize()
            snapshot = torch.cuda.memory._snapshot()
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        path = session.folder / f"history-{method.replace(' ', '-')}.pickle"
        path.write_bytes(pickle.dumps(snapshot))
        path.with_suffix(".pickle.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        found[method] = {"events": sum(len(trace) for trace in snapshot["device_traces"])}
        try:
            found[method]["replayed"] = [str(verdict) for verdict in replay_snapshot(read_snapshot(path))]
        except VdnnError as error:  # the file tells what it was
            found[method]["refused"] = str(error)
        path.unlink()
        session.keep(found)
        del setup
    return found
