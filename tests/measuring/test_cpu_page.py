"""The experiment on a CPU: its rows are of both, prediction and measurement, and its page says what they say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from vdnn.experiment import read_experiment, write_page
from vdnn.experiment.cpu import files_of, machine_file
from vdnn.values import RunResult, hardware, save, to_toml

TIMES_MS = {"demo:cnn": (300, 250), "demo:transformer": (90, 100)}  # predicted, measured


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    models = [f'{{ model = "{name}", batch = 2, seen = {str(name == "demo:cnn").lower()} }}' for name in TIMES_MS]
    text = f'title = "T"\n[cpu]\ntitle = "Two"\nfile = "two.png"\nmodels = [{", ".join(models)}]\n'
    (tmp_path / "cpu.toml").write_text(text)
    section = read_experiment(tmp_path / "cpu.toml").cpu
    assert section is not None
    (tmp_path / "runs").mkdir()
    machine_file(tmp_path).write_text(to_toml(hardware("t4")))
    for model in section.models:
        predicted_ms, measured_ms = TIMES_MS[model.name]
        predicted = RunResult(
            "simulated", model.name, 2, "cpu", "none", "fp32", "", "", iteration_time_ns=predicted_ms * 10**6
        )
        measured = replace(predicted, source="measured", iteration_time_ns=measured_ms * 10**6, notes=("load 0.1",))
        for path, result in zip(files_of(tmp_path, model), (measured, predicted), strict=True):
            save(result, path)
    return tmp_path


def test_the_rows_of_a_cpu_hold_prediction_and_measurement_and_the_page_says_the_same(folder: Path) -> None:
    """`results.json` was empty: the page's numbers were nowhere but in its text."""
    write_page(read_experiment(folder / "cpu.toml"), folder)
    rows = {row["model"]: row for row in json.loads((folder / "results.json").read_text())}
    assert {name: (row["predicted_iteration_time_ns"], row["iteration_time_ns"]) for name, row in rows.items()} == {
        name: (predicted * 10**6, measured * 10**6) for name, (predicted, measured) in TIMES_MS.items()
    }
    assert rows["demo:cnn"]["error"] == pytest.approx(0.2)
    assert rows["demo:transformer"]["error"] == pytest.approx(-0.1)
    assert [rows[name]["seen"] for name in TIMES_MS] == [True, False]
    page = (folder / "README.md").read_text()
    for name, row in rows.items():
        shown = re.search(rf"{name} +2 .*", page)
        assert shown is not None
        assert f"{100 * row['error']:+.1f}" in shown[0].split()
    assert "All: median error 15.0 %, largest 20.0 %, 2 of 2 within 20 %." in page
