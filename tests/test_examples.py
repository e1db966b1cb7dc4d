"""The examples run as they are written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_plain_loop() -> None:
    said = run(sys.executable, "examples/plain.py")
    assert "offload is active: " in said
    assert "came back" in said


@pytest.mark.slow
@pytest.mark.case(57)
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes(name: str) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    said = run(*launcher, f"examples/{name}.py")
    assert said.count("equal to training without offload") == 2
