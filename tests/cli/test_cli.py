"""The command line: exit codes, one sentence for a mistake, numbers on stdout."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch

from vdnn.cli.main import command_line


@dataclasses.dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def vdnn(*arguments: str, cwd: Path | None = None) -> Done:
    """The command line in this process: a new one would import torch anew, each time."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["vdnn", *arguments]),
        contextlib.chdir(cwd or "."),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            command_line()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Exception:
            traceback.print_exc()
            code = 1
    return Done(code, out.getvalue(), err.getvalue())


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
        "import sys; from vdnn.cli.main import command_line\n"
        "try:\n    command_line()\nfinally:\n    assert not {'torch', 'matplotlib'} & set(sys.modules)"
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
        (("simulate", "{trace}", "--gpu", "t4", "-o", "out.txt"), "must end in .json"),
        (("run", "{trace}", "--gpu", "t4"), "a run trains a model"),
        (("run", "demo:cnn", "--gpu", "t4", "--device", "gpu"), "unknown device 'gpu'"),
        (("run", "demo:cnn", "--gpu", "t4", "--steps", "1", "--batch", "2"), "run 2 or more"),
        (("run", "demo:cnn", "--gpu", "t4", "--min-bytes", "much"), "'much' is not a size"),
        (("experiment", "nowhere.toml"), "cannot read nowhere.toml"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(trace: Path, arguments: tuple[str, ...], words: str) -> None:
    done = vdnn(*(a.format(trace=trace) for a in arguments))
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a plan for CUDA runs on it")
def test_a_plan_for_another_device_says_how_to_make_one_for_this(tmp_path: Path) -> None:
    """It said that the saved tensors differ, and to plan from "this trace", which nobody had seen."""
    asked = ("demo:cnn", "--batch", "2", "--gpu", "t4")
    plan = ("plan", *asked, "--policy", "vdnn-all")
    assert vdnn(*plan, "-o", str(tmp_path / "cuda.json")).returncode == 0
    run = ("run", *asked, "--steps", "2", "--plan")
    refused = vdnn(*run, str(tmp_path / "cuda.json"))
    assert refused.returncode == 2
    assert "`vdnn plan MODEL --device cpu … -o FILE`" in refused.stderr
    assert vdnn(*plan, "--device", "cpu", "-o", str(tmp_path / "cpu.json")).returncode == 0
    done = vdnn(*run, str(tmp_path / "cpu.json"))
    assert done.returncode == 0, done.stderr


def test_run_prints_prediction_beside_measurement(tmp_path: Path) -> None:
    done = vdnn("run", "demo:cnn", "--batch", "2", "--steps", "2", "--gpu", "t4", "--policy", "vdnn-all",
                "--min-bytes", "1KiB", "--device", "virtual", "--json", "-o", "result.json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith("Wrote result.json")
    row = json.loads(done.stdout)
    assert row["source"] == "measured"
    assert row["exact"] is True
    assert row["peak_requested_bytes"] == row["predicted"]["peak_requested_bytes"]
    assert row["peak_requested_bytes"] < row["baseline"]["peak_requested_bytes"]
    assert row["baseline"]["source"] == "measured"
    shown = vdnn("report", "result.json", cwd=tmp_path)
    assert "what fills the peak" in shown.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none() -> None:
    done = vdnn("run", "demo:cnn", "--gpu", "t4", "--device", "cuda")
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert "--device virtual" in done.stderr


def test_a_plan_for_another_model_is_refused(trace: Path, tmp_path: Path) -> None:
    made = vdnn("plan", str(trace), "--gpu", "t4", "-o", "cnn.plan.json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    for arguments in (
        ("simulate", "demo:transformer", "--batch", "2", "--gpu", "t4", "--plan", "cnn.plan.json"),
        ("run", "demo:transformer", "--batch", "2", "--gpu", "t4", "--plan", "cnn.plan.json", "--device", "virtual"),
        ("run", "demo:cnn", "--batch", "3", "--gpu", "t4", "--plan", "cnn.plan.json", "--device", "virtual"),
    ):
        done = vdnn(*arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert "plan" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_damaged_foreign_and_newer_files_are_told_apart(trace: Path, tmp_path: Path) -> None:
    whole = gzip.decompress(trace.read_bytes())
    cases = {
        "short.json": (whole[: len(whole) // 2], "short.json"),
        "short.json.gz": (trace.read_bytes()[:300], "short.json.gz"),
        "foreign.json": (b'{"a": 1}', "foreign.json"),
        "newer.json": (whole.replace(b'"version":1', b'"version":99').replace(b'"version": 1', b'"version": 99'), "99"),
    }
    for name, (data, words) in cases.items():
        (tmp_path / name).write_bytes(data)
        done = vdnn("simulate", name, "--gpu", "t4", cwd=tmp_path)
        assert done.returncode == 2, (name, done.stderr)
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    done = vdnn("simulate", str(trace), "--plan", str(trace), "--gpu", "t4")
    assert done.returncode == 2
    assert "plan" in done.stderr


def test_a_factory_that_raises_is_told_with_its_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def make(batch):\n    x = 1\n    raise RuntimeError('no weights')\n")
    done = vdnn("simulate", "mine.py:make", "--gpu", "t4", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "no weights" in done.stderr
    assert "mine.py" in done.stderr
    assert "3" in done.stderr
    shown = vdnn("simulate", "mine.py:make", "--gpu", "t4", "--debug", cwd=tmp_path)
    assert "Traceback" in shown.stderr


def test_the_installed_command_is_this_one() -> None:
    scripts = {e.name: e.value for e in importlib.metadata.distribution("vdnn").entry_points}
    assert scripts["vdnn"] == "vdnn.cli.main:main"


def test_the_help_says_what_vdnn_is_for_and_its_exit_codes() -> None:
    listed = " ".join(vdnn("--help").stdout.split())
    assert "Train PyTorch models that do not fit" in listed
    assert "3 (no plan fits the budget)" in listed
    assert vdnn("--version").stdout == f"vdnn {importlib.metadata.version('vdnn')}\n"


def test_every_command_has_an_example() -> None:
    listed = vdnn("--help").stdout
    for command in ("run", "capture", "plan", "simulate", "compare", "max-batch", "experiment", "report", "list"):
        assert command in listed
        assert f"Example: vdnn {command}" in vdnn(command, "--help").stdout


def test_a_second_look_at_a_model_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from vdnn.cli.main import command_line\n"
        "try:\n    command_line()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )

    def simulated(*more: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", code, "simulate", "demo:cnn", "--batch", "2", "--gpu", "t4", "--json", *more],
            capture_output=True, text=True, check=True, env={**os.environ, "VDNN_CACHE": str(tmp_path)},
        )  # fmt: skip
        return done.stdout, done.stderr.split()[-1]

    first, loaded = simulated()
    assert loaded == "True"
    again, loaded = simulated()
    assert loaded == "False"
    assert again == first
    assert simulated("-O", "image_size=32")[1] == "True"
    assert simulated("--no-cache") == (first, "True")
