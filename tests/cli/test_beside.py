"""`vdnn compare --measured`: results from files beside their predictions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.cli.test_cli import vdnn
from vdnn.values import RunResult, save

PREDICTED = RunResult(
    source="simulated", model="demo:cnn", batch=2, gpu="t4", policy="none", precision="fp32", trace="", plan="",
    peak_requested_bytes=1000, iteration_time_ns=2_000_000, offloaded_bytes=0,
)  # fmt: skip
MEASURED = dataclasses.replace(PREDICTED, source="measured", peak_requested_bytes=1100, iteration_time_ns=2_500_000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(MEASURED, tmp_path / "runs" / "one.json")
    save(PREDICTED, tmp_path / "runs" / "one.predicted.json")
    (tmp_path / "results.json").write_text("[]\n")  # a folder of results holds tables, too
    return tmp_path


def test_a_folder_of_measured_results_is_held_beside_its_predictions(folder: Path) -> None:
    done = vdnn("compare", "--measured", str(folder), "--json")
    (row,) = json.loads(done.stdout)
    found = {d["quantity"]: (d["predicted"], d["measured"], d["percent"]) for d in row["differences"]}
    assert found["peak_requested_bytes"] == (1000, 1100, 10.0)
    assert found["iteration_time_ns"] == (2_000_000, 2_500_000, 25.0)
    shown = vdnn("compare", "--measured", str(folder)).stdout
    assert "+25.0" in shown
    assert "2.50" in shown


def test_the_figure_of_measured_results_is_drawn(folder: Path) -> None:
    figure = folder / "prediction.png"
    done = vdnn("compare", "--measured", str(folder), "--figure", str(figure))
    assert done.stderr.strip().endswith(f"Wrote {figure}")
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_a_prediction_of_this_command_goes_before_the_one_in_the_folder(folder: Path) -> None:
    done = vdnn(
        "compare", "demo:cnn", "--batch", "2", "--gpu", "t4", "--policy", "none", "--measured", str(folder), "--json"
    )
    (row,) = json.loads(done.stdout)
    assert row["measured"]["iteration_time_ns"] == 2_500_000
    assert row["predicted"]["peak_requested_bytes"] not in (None, 1000)


def test_what_cannot_be_held_beside_anything_is_said(tmp_path: Path) -> None:
    save(MEASURED, tmp_path / "one.json")
    done = vdnn("compare", "--measured", str(tmp_path))
    assert done.returncode == 2
    assert "one.json (demo:cnn, batch 2, t4, none)" in done.stderr
    assert "no measured result with a prediction" in done.stderr
    missing = vdnn("compare", "--measured", str(tmp_path / "not-there"))
    assert (missing.returncode, "is not there" in missing.stderr) == (2, True)
    nothing = vdnn("compare")
    assert (nothing.returncode, "--measured" in nothing.stderr) == (2, True)
