"""`--json` of every command: it parses, its keys stay, and its numbers are those of the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import vdnn
from vdnn.analysis.synthetic import conv_chain
from vdnn.reporting.rows import COLUMNS
from vdnn.units import format_bytes
from vdnn.values import save

RESULT = {*COLUMNS, "slowdown", "saving_of", "saving_bytes", "saving_percent", "baseline"}
PLAN = {"policy", "model", "batch", "device", "budget_bytes", "offloaded_bytes", "default", "min_bytes", "notes"}
MACHINE = {"id", "name", "memory_bytes", "available_bytes", "dram_bytes_per_s", "d2h_bytes_per_s", "h2d_bytes_per_s"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace, a plan and a result."""
    folder = tmp_path_factory.mktemp("json")
    trace = str(folder / "trace.json")
    save(conv_chain(batch=64, channels=(16, 16, 32), size=32), trace)
    asked = (trace, "--gpu", "rtx4090", "--policy", "vdnn-all")
    assert vdnn("plan", *asked, "-o", str(folder / "plan.json")).returncode == 0
    assert vdnn("simulate", *asked, "-o", str(folder / "result.json")).returncode == 0
    return folder


def both(*arguments: str) -> tuple[Any, str]:
    """What a command gives with --json and without; nothing else is on stdout."""
    shown = [vdnn(*arguments, *more) for more in (("--json",), ())]
    for done in shown:
        assert done.returncode == 0, done.stderr
    return json.loads(shown[0].stdout), " ".join(shown[1].stdout.split())


def test_simulate_and_compare(files: Path) -> None:
    row, text = both("simulate", str(files / "trace.json"), "--gpu", "t4", "--policy", "vdnn-all")
    assert {*row} == RESULT
    assert f"{row['peak_requested_bytes'] / 2**20:.1f}" in text
    assert f"{row['slowdown']:.2f}×" in text
    rows, _ = both("compare", str(files / "trace.json"), "--gpu", "t4", "--policy", "vdnn-all")
    assert [one["policy"] for one in rows] == ["none", "vdnn-all"]
    assert rows[1] == row
    alone, _ = both("compare", str(files / "trace.json"), "--gpu", "t4", "--policy", "none")
    assert [one["policy"] for one in alone] == ["none"]  # one row is a list, too


def test_plan_and_its_explanation(files: Path) -> None:
    asked = ("plan", str(files / "trace.json"), "--gpu", "t4", "--policy", "vdnn-all")
    row, text = both(*asked)
    assert {*row} == PLAN | {"entries"}
    assert f"{format_bytes(row['offloaded_bytes'])}, are offloaded" in text
    assert row["offloaded_bytes"] == sum(entry["moved_bytes"] for entry in row["entries"])
    explained, _ = both(*asked, "--explain")
    assert {*explained} == PLAN | RESULT | {"entries"}
    assert explained["offloaded_bytes"] == row["offloaded_bytes"]


def test_report_of_every_kind_of_file(files: Path) -> None:
    row, text = both("report", str(files / "trace.json"))
    assert f"{format_bytes(row['saved_bytes'])} in {row['saved_tensors']} tensors" in text
    row, text = both("report", str(files / "plan.json"))
    assert {*row} == PLAN | {"entries"}
    assert row["policy"] in text
    row, text = both("report", str(files / "result.json"))
    assert {*row} == RESULT | {"peak_at", "peak", "notes"}
    assert format_bytes(row["peak_requested_bytes"]) in text
    assert sum(part["nbytes"] for part in row["peak"]) == row["peak_requested_bytes"]


def test_lists(files: Path) -> None:
    rows, text = both("list", "gpus")
    assert all({*row} >= MACHINE for row in rows)
    assert all(row["available_bytes"] <= row["memory_bytes"] and row["id"] in text for row in rows)
    rows, text = both("list", "policies")
    assert {"none", "vdnn-all", "vdnn-dyn", "budget"} <= {row["policy"] for row in rows}
    assert all(row["does"] and row["policy"] in text for row in rows)


def test_advise_and_max_batch(files: Path) -> None:
    rows, text = both("advise", str(files / "trace.json"), "--gpu", "t4")
    assert {*rows[0]} >= RESULT | {"memory_bytes", "available_bytes", "how", "needs_bytes", "time_ns", "bound_ns"}
    assert f"{rows[0]['available_bytes'] / 2**30:.2f}" in text
    rows, text = both("max-batch", "demo:cnn", "--gpu", "t4", "--memory", "32MiB", "--policy", "none")
    assert {*rows[0]} == RESULT
    assert f"none {rows[0]['batch']} " in text


def test_a_table_of_gpus_is_one_table() -> None:
    """Twenty GPUs had the rates both ways together in a second table, far below."""
    lines = vdnn("list", "gpus").stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("rtx4090 ") for line in lines) == 1


def test_fit(tmp_path: Path) -> None:
    asked = ("fit", "--folder", "results/fidelity/runs", "-o")
    rows = json.loads(vdnn(*asked, str(tmp_path / "one.toml"), "--json").stdout)
    text = vdnn(*asked, str(tmp_path / "two.toml")).stdout
    assert len(rows) == 5
    for row in rows:
        assert {*row} == {"rows_of", "kept_out", "rows", "median", "p90", "bias"}
        assert f"| {row['rows_of']} | {row['kept_out']} | {row['rows']} | {row['median']:.1%} |" in text


def test_the_library_and_the_shell_have_the_same_numbers() -> None:
    import vdnn as library

    asked = ("demo:cnn", "--batch", "8", "--gpu", "titan-x", "--rules", "paper", "--policy", "vdnn-conv")
    row = json.loads(vdnn("compare", *asked, "--json", "--no-cache").stdout)[1]
    trace = library.capture(library.load("demo:cnn", batch=8))
    plan = library.plan(trace, "titan-x", "vdnn-conv", rules="paper")
    result = library.simulate(trace, plan, "titan-x")
    assert row["iteration_time_ns"] == result.iteration_time_ns
    assert row["peak_reserved_bytes"] == result.peak_reserved_bytes
    assert row["offloaded_bytes"] == result.offloaded_bytes > 0


def test_reproduction() -> None:
    rows, text = both("reproduction", "results/paper")
    for row in rows:
        assert {*row} >= {"figure", "values", "judged", "within", "worst"}
        assert f"| {row['figure']} | {row['values']} |" in text
