"""Experiments: what a file may say, resuming, and pages made from files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vdnn.errors import EngineError, FormatError, UsageError
from vdnn.experiment import read_experiment, run_missing, write_page
from vdnn.values import load, save

SMALL = """
title = "Small"
[[simulate]]
title = "Predicted"
models = ["demo:cnn"]
batches = [2, 4]
gpus = ["t4"]
policies = ["vdnn-all"]
min_bytes = 1024
[[run]]
title = "Trained"
models = ["demo:cnn"]
batches = [2]
gpus = ["t4"]
policies = ["vdnn-conv"]
steps = 2
device = "virtual"
min_bytes = 1024
[[figure]]
kind = "memory"
file = "memory.png"
select = { batch = 4, policy = "vdnn-all" }
[[figure]]
kind = "layers"
file = "layers.svg"
select = { batch = 4, policy = "vdnn-all" }
[[figure]]
kind = "prediction"
file = "prediction.png"
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    file = tmp_path / "small.toml"
    file.write_text(SMALL)
    return file


def test_an_experiment_runs_resumes_and_writes_its_page(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    experiment = read_experiment(small)
    told: list[str] = []
    assert run_missing(experiment, folder, progress=lambda what, done, total: told.append(what)) == (6, 0)
    assert any(what.startswith("train demo:cnn batch=2 vdnn-conv: step 2 of 2") for what in told)
    text = write_page(experiment, folder)
    assert "vdnn-conv" in text
    page = (folder / "README.md").read_text()
    assert "![memory](memory.png)" in page
    rows = json.loads((folder / "results.json").read_text())
    assert [(r["source"], r["batch"], r["policy"]) for r in rows] == [
        ("simulated", 2, "none"),
        ("simulated", 2, "vdnn-all"),
        ("simulated", 4, "none"),
        ("simulated", 4, "vdnn-all"),
        ("measured", 2, "none"),
        ("measured", 2, "vdnn-conv"),
    ]
    assert rows[5]["offloaded_bytes"] > 0
    assert all((folder / name).stat().st_size > 1000 for name in ("memory.png", "layers.svg", "prediction.png"))

    # nothing runs twice; what is lost runs again, and only that
    assert run_missing(experiment, folder) == (0, 6)
    lost = next(path for path in (folder / "runs").glob("*-4-*-vdnn-all-*.json") if "timeline" not in path.name)
    lost.unlink()
    told.clear()
    assert run_missing(experiment, folder, progress=lambda what, done, total: told.append(what)) == (1, 5)
    assert [what for what in told if what.startswith("simulate")] == ["simulate demo:cnn 4 t4 vdnn-all"]
    assert write_page(experiment, folder) == text


def test_a_run_that_was_not_exact_fails_after_its_page_is_written(small: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    folder = tmp_path / "results"
    experiment = read_experiment(small)
    run_missing(experiment, folder)
    file = next(path for path in (folder / "runs").glob("*-2-*-vdnn-conv-*.json") if "predicted" not in path.name)
    save(replace(load(file), exact=False, notes=("2 steps: NOT equal",)), file)
    with pytest.raises(EngineError, match="vdnn-conv: 2 steps: NOT equal"):
        write_page(experiment, folder)
    assert (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('models = ["demo:cnn"]\nbatches = [2, 4]', 'models = ["demo:cn"]\nbatches = [2, 4]', "did you mean"),
        ('gpus = ["t4"]', 'gpus = ["t5"]', "did you mean t4"),
        ('policies = ["vdnn-all"]', 'policies = ["vdnn-al"]', "did you mean vdnn-all"),
        ("batches = [2, 4]", "batches = [2, 0]", "batch"),
        ("batches = [2, 4]", "batches = []", "not empty"),
        ("batches = [2, 4]", "batch = [2, 4]", "did you mean batches"),
        ("min_bytes = 1024\n[[run]]", 'min_bytes = "1K"\n[[run]]', "min_bytes"),
        ('title = "Predicted"', "", "has no 'title'"),
        ('kind = "memory"', 'kind = "memories"', "did you mean memory"),
        ("select = { batch = 4", "select = { batch = 5", "shows nothing"),
        ("select = { batch = 4", "select = { size = 5", "unknown selection"),
        ('file = "memory.png"', 'file = "../memory.png"', "plain name"),
        ('title = "Small"', "title = ", "is not TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_before_anything_runs(small: Path, old: str, new: str, words: str) -> None:
    assert old in SMALL
    small.write_text(SMALL.replace(old, new, 1))
    with pytest.raises(UsageError, match=words):
        read_experiment(small)


def test_a_file_that_is_not_there_or_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot read"):
        read_experiment(tmp_path / "none.toml")
    (tmp_path / "empty.toml").write_text('title = "x"')
    with pytest.raises(FormatError, match="runs nothing"):
        read_experiment(tmp_path / "empty.toml")
