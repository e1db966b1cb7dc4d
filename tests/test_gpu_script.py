"""The script for a GPU, on the path that needs none: so that it runs at once where there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.gpu.check import main, table
from experiments.gpu.methods import METHODS, OURS
from experiments.gpu.parts import PARTS
from experiments.gpu.parts.compared import over_ideal, predicted, union
from experiments.gpu.session import Session


def test_gradients_under_every_policy(tmp_path: Path) -> None:
    assert main(["--virtual", "-o", str(tmp_path), "--part", "gradients", "--model", "gpt2"]) == 0
    found = json.loads((tmp_path / "gradients-gpt2.json").read_text())
    (row,) = found["result"].values()
    assert row["reproducible"]
    assert all(row[policy] == {"exact": True, "differs": ""} for policy in OURS)


def test_nothing_is_started_when_the_time_is_up(tmp_path: Path) -> None:
    assert main(["--virtual", "-o", str(tmp_path), "--seconds", "0"]) == 0
    for part in PARTS:
        assert "not_run" in json.loads((tmp_path / f"{part}.json").read_text())


def test_no_network_of_that_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--virtual", "-o", str(tmp_path), "--model", "nothing"]) == 2
    assert "no network has nothing in its name" in capsys.readouterr().err


def test_the_bound_takes_the_slower_of_compute_and_link_each_way(tmp_path: Path) -> None:
    session = Session(True, tmp_path, 1)
    session.link = {"d2h_bytes_per_s": 100, "h2d_bytes_per_s": 50, "duplex_bytes_per_s": 120}
    plain = {"forward_s": 1.0, "backward_s": 2.0, "step_s": 3.5}
    # out 2 s > forward 1 s; back 1 s < backward 2 s; the optimizer's 0.5 s: 4.5 s
    ours = {"offloaded_bytes": 200, "returned_bytes": 50, "step_s": 4.95}
    assert over_ideal(session, plain, ours) == pytest.approx(1.1)


def test_predictions_are_made_with_the_link_that_was_measured(tmp_path: Path) -> None:
    """The measured rates were once made floats, which the simulator's whole numbers do not survive."""
    session = Session(True, tmp_path, 1, ["gpt2"])
    session.link = {"d2h_bytes_per_s": 10**9, "h2d_bytes_per_s": 10**8, "duplex_bytes_per_s": 10**9}
    machine = session.hardware()
    machine.check()
    assert (machine.d2h_bytes_per_s, machine.h2d_bytes_per_s, machine.duplex_bytes_per_s) == (10**9, 10**8, 10**9)
    slow = predicted(session, session.workloads[0], "vdnn-all")
    session.link = {}
    fast = predicted(session, session.workloads[0], "vdnn-all")
    assert isinstance(slow["iteration_time_ns"], int)
    assert slow["iteration_time_ns"] >= fast["iteration_time_ns"]
    assert slow["offloaded_bytes"] == fast["offloaded_bytes"]


def test_union_of_spans() -> None:
    assert union([(0, 4), (2, 6), (8, 9), (8, 9)]) == 7
    assert union([]) == 0


@pytest.mark.case(55)
@pytest.mark.slow
def test_every_method_is_run_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--virtual", "-o", str(tmp_path), "--part", "compared", "--model", "gpt2"]) == 0
    rows = json.loads((tmp_path / "compared-gpt2.json").read_text())["result"]
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert ("measured" in row) + ("not_run" in row) + ("failed" in row) == 1
        if row["method"] in OURS:
            assert row["measured"]["offloaded_bytes"] or row["method"] == "checkpoint"
            assert not row["measured"]["mismatches"]
    assert table(rows) in capsys.readouterr().out
