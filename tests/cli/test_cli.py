"""The command line: exit codes, one sentence for a mistake, numbers on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def vdnn(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = "from vdnn.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, timeout=200, check=False
    )


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "cnn.json.gz"
    done = vdnn("capture", "demo:cnn", "--batch", "2", "--device", "cpu", "-o", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith(f"Wrote {path}")
    assert done.stdout == ""
    return path


def test_simulate_of_a_file_prints_the_rows_and_loads_no_torch(trace: Path) -> None:
    code = (
        "import sys; from vdnn.cli.main import main\n"
        "try:\n    main()\nfinally:\n    assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "simulate", str(trace), "--gpu", "t4", "--policy", "vdnn-all", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    row = json.loads(done.stdout)
    assert row["policy"] == "vdnn-all"
    assert row["gpu"] == "t4"
    assert row["baseline"]["policy"] == "none"
    assert row["peak_allocated_bytes"] is None


def test_nothing_is_overwritten_without_force(trace: Path) -> None:
    done = vdnn("capture", "demo:cnn", "-o", str(trace))
    assert done.returncode == 2
    assert "exists" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("simulate", "{trace}", "--gpu", "rtx4091"), "did you mean rtx4090"),
        (("simulate", "{trace}", "--gpu", "t4", "--policy", "vdnn-al"), "did you mean vdnn-all"),
        (("simulate", "torchvision:resnet51", "--gpu", "t4"), "did you mean resnet5"),
        (("simulate", "demo:cnn", "--gpu", "t4", "--batch", "0"), "batch"),
        (("simulate", "demo:cnn", "--gpu", "t4", "--batch", "many"), "batch"),
        (("simulate", "demo:cnn", "--gpu", "t4", "--precision", "fp33"), "did you mean fp32"),
        (("report", "nowhere.json"), "cannot read nowhere.json"),
        (("list", "gpu"), "did you mean gpus"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(trace: Path, arguments: tuple[str, ...], words: str) -> None:
    done = vdnn(*(a.format(trace=trace) for a in arguments))
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
