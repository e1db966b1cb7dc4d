"""Ordering: a step must not synchronize, and PyTorch's CUDA stream sanitizer must find nothing in it."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from typing import Any

import torch

from experiments.gpu.methods import METHODS, OURS, NotHere, moved
from experiments.gpu.session import ROOT, Session
from experiments.gpu.workloads import SMALL, Setup

_SANITIZED = "experiments.gpu.parts.streams"


def check(session: Session) -> dict[str, Any]:
    if session.virtual:
        return {
            "skipped": "streams of a CPU are stand-ins; the virtual device's race detector checks them in the tests"
        }
    found: dict[str, Any] = {}
    for policy in ("no offload", *OURS):  # a model may synchronize by itself
        try:
            found[policy] = _synchronizes(session, policy)
        except NotHere as error:
            found[policy] = {"not_run": str(error)}
        session.keep(found)
    # the sanitizer must be there before CUDA is used, so it has a process of its own
    environment = {**os.environ, "TORCH_CUDA_SANITIZER": "1"}
    left = max(30, min(300, int(session.left_s())))
    try:
        done = subprocess.run(
            [sys.executable, "-m", _SANITIZED], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left
        )
        found["sanitizer"] = {"returned": done.returncode, "said": (done.stdout + done.stderr)[-2000:]}
    except subprocess.TimeoutExpired:
        found["sanitizer"] = {"not_finished": f"stopped after {left} s"}
    return found


def _synchronizes(session: Session, policy: str) -> dict[str, Any]:
    """The third step, in which every wait of the host's is an error; and what moved, or it would tell nothing."""
    setup = Setup(SMALL[1], session.device)
    with METHODS[policy](setup) as around:
        setup.step(around)  # captures, plans and pins memory: that may wait
        setup.step(around)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            setup.step(around)
            found = {"synchronizes": ""}
        except RuntimeError as error:
            found = {"synchronizes": str(error).splitlines()[0], "where": traceback.format_exc(limit=-3)}
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {**found, **moved(setup)} if policy in OURS else found


def sanitized() -> None:
    """Three steps of two networks under every policy of ours; the sanitizer raises at what it finds."""
    for workload in SMALL[1:]:
        for policy in OURS:
            setup = Setup(workload, torch.device("cuda"))
            try:
                with METHODS[policy](setup) as around:
                    for _ in range(3):
                        setup.step(around)
                    print(f"{workload} {policy}: {moved(setup)}")
            except NotHere:
                continue
            except Exception as error:
                print(f"{workload} {policy}: {type(error).__name__}: {error}")
                raise
    torch.cuda.synchronize()
    print("nothing found")


if __name__ == "__main__":
    sanitized()
