"""Plans for budgets as an experiment: the numbers in its file, and the tables of its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vdnn
from vdnn.errors import FormatError
from vdnn.experiment import read_experiment, run_missing, write_page

SMALL = """
title = "Small"
[[frontier]]
title = "Plans"
file = "plans.png"
gpus = ["t4"]
precision = "fp32"
percents = [60, 5]
policies = ["vdnn-all", "checkpoint"]
models = [{ model = "demo:cnn", batch = 256 }]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object], str]:
    folder = tmp_path_factory.mktemp("frontier")
    file = folder / "small.toml"
    file.write_text(SMALL)
    experiment = read_experiment(file)
    assert run_missing(experiment, folder / "results") == (1, 0)
    (data,) = (folder / "results" / "runs").glob("frontier-*.json")
    write_page(experiment, folder / "results")
    return data, json.loads(data.read_text()), (folder / "results" / "README.md").read_text()


def test_what_stays_is_what_the_model_weighs(run: tuple[Path, dict[str, object], str]) -> None:
    _, data, _ = run
    model = vdnn.load("demo:cnn", 256).build()
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert weights <= data["resident_bytes"] <= 2 * weights + 4 * 8_519_680  # gradients, and two cuBLAS workspaces


def test_every_plan_fits_is_no_faster_than_its_bound_and_explains_a_large_gap(
    run: tuple[Path, dict[str, object], str],
) -> None:
    _, data, _ = run
    budgets = data["budgets"]
    assert isinstance(budgets, dict)
    assert budgets
    for b in budgets.values():
        assert b["peak_reserved_bytes"] <= b["budget_bytes"]
        assert b["bound_ns"] <= b["time_ns"]
        gap = b["time_ns"] - b["bound_ns"]
        assert (b["gap"] is None) == (gap <= 0.2 * b["bound_ns"])
        if b["gap"]:
            assert sum(b["gap"].values()) == gap


def test_the_page_says_by_how_much_activations_shrink_and_what_gaps_are_made_of(
    run: tuple[Path, dict[str, object], str], tmp_path: Path
) -> None:
    path, data, page = run
    assert "gap to the bound" in page
    folder = tmp_path / "results"
    (folder / "runs").mkdir(parents=True)
    made = {"time_ns": 110, "bound_ns": 80, "peak_requested_bytes": 3 << 30, "peak_reserved_bytes": 5 << 30}
    parts = {"fragments_ns": 4, "again_ns": 8, "storages_ns": 2, "copies_ns": 16}
    budget = {**next(iter(data["budgets"].values())), **made, "gap": parts}  # type: ignore[attr-defined]
    there = {"time_ns": 100, "resident_bytes": 1 << 30, "requested_bytes": 9 << 30, "baseline_bytes": 11 << 30}
    (folder / "runs" / path.name).write_text(json.dumps({**data, **there, "budgets": {"60": budget}}))
    file = tmp_path / "small.toml"
    file.write_text(SMALL)
    write_page(read_experiment(file), folder)
    rows = [line.split() for line in (folder / "README.md").read_text().splitlines() if "t4" in line]
    # (9 - 1) GiB become (3 - 1), and of those reserved (11 - 1) become (5 - 1)
    assert ["cnn", "(256)", "t4", "8.00", "2.00", "4.0×", "2.5×", "10", "-20"] in rows
    assert ["cnn", "(256)", "t4", "60", "%", "38", "5", "10", "2", "20"] in rows


def test_one_network_of_two_sources_has_two_rows(run: tuple[Path, dict[str, object], str], tmp_path: Path) -> None:
    """GoogLeNet of the paper and torchvision's shared a row: the later one was shown."""
    path, data, _ = run
    (tmp_path / "runs").mkdir()
    text = SMALL.replace("demo:cnn", "paper:vgg16").replace(" }]", ' }, { model = "torchvision:vgg16", batch = 256 }]')
    for name in (path.name.replace("demo-cnn", source) for source in ("paper-vgg16", "torchvision-vgg16")):
        (tmp_path / "runs" / name).write_text(json.dumps(data))
    file = tmp_path / "small.toml"
    file.write_text(text)
    write_page(read_experiment(file), tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "paper:vgg16 (256)" in page
    assert "torchvision:vgg16 (256)" in page


def test_percents_beyond_a_hundred_are_none(tmp_path: Path) -> None:
    file = tmp_path / "small.toml"
    file.write_text(SMALL.replace("[60, 5]", "[60, 105]"))
    with pytest.raises(FormatError, match="from 0 to 100"):
        read_experiment(file)
