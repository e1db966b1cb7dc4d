"""The tests marked `gpu`, as pytest runs them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

from experiments.gpu.session import ROOT, Session


def run(session: Session) -> dict[str, Any]:
    if session.virtual:
        return {"skipped": "they skip themselves without a CUDA device"}
    if importlib.util.find_spec("pytest") is None:
        return {"not_run": "pytest is not installed"}
    left = max(30, int(session.left_s()))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", "-p", "no:cacheprovider", "tests"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode() if isinstance(error.stdout, bytes) else (error.stdout or "")
        return {"not_finished": f"stopped after {left} s", "said": said[-2000:]}
    return {"returned": done.returncode, "said": done.stdout[-4000:]}
