"""The script for a GPU, on the path that needs none: so that it runs at once where there is one."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import vdnn
from experiments.gpu import check, methods, session
from experiments.gpu.check import main, table
from experiments.gpu.methods import METHODS, OURS
from experiments.gpu.parts import PARTS, compared, history, limits, link, streams
from experiments.gpu.parts.compared import over_ideal, predicted, union
from experiments.gpu.session import Session
from experiments.gpu.workloads import Workload
from tests.fake_cuda import Driver, pretended_cuda
from vdnn.sim.allocator_snapshot import step_snapshot


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


# -- the same script on a GPU that is made up ------------------------------------------------------

TINY = Workload("demo:transformer", {"batch": 2, "sequence": 16, "layers": 2, "hidden": 32})


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """A card, one network that is tried in a second, and methods that need no other package."""
    monkeypatch.setattr(session, "WORKLOADS", (TINY,))
    for module in (methods, streams, history):
        monkeypatch.setattr(module, "SMALL", (TINY,) * 3)
    monkeypatch.setattr(streams, "OURS", ("vdnn-all",))
    monkeypatch.setattr(compared, "WARM", 1)
    monkeypatch.setattr(compared, "TIMED", 1)
    monkeypatch.setattr(limits, "TIGHT", ((1, TINY),))
    monkeypatch.setattr(link, "BYTES", 2**16)
    kept = ("no offload", "vdnn-all", "save_on_cpu", "torchtune")
    monkeypatch.setattr(compared, "METHODS", {name: METHODS[name] for name in kept})
    with pretended_cuda("NVIDIA H100 80GB HBM3", 80 * 10**9) as driver:
        yield driver


def part(name: str, folder: Path) -> Any:
    """What a part found on the card, in this process."""
    assert main(["-o", str(folder), "--part", name]) == 0
    found = json.loads((folder / f"{name}.json").read_text())
    assert (found["provenance"]["gpu"], "unfinished" in found) == ("NVIDIA H100 80GB HBM3", False)
    return found["result"]


def test_link_and_limits_on_a_card(driver: Driver, tmp_path: Path) -> None:
    assert all(rate > 0 for rate in part("link", tmp_path).values())
    (row,) = part("limits", tmp_path)
    assert row["vdnn-all"]["decided"] == "vdnn-all"
    assert {"no offload", "by budget"} < row.keys()
    assert driver.fraction == 1.0


def test_streams_on_a_card_and_something_moved(driver: Driver, tmp_path: Path, capsys: Any) -> None:
    """The sizes of the small networks are below what a policy moves, so on a GPU nothing was checked."""
    done = subprocess.CompletedProcess([], 0, "nothing found", "")
    with mock.patch("subprocess.run", return_value=done) as run:
        found = part("streams", tmp_path)
    assert run.call_args.kwargs["env"]["TORCH_CUDA_SANITIZER"] == "1"
    assert found["no offload"] == {"synchronizes": ""}
    assert found["vdnn-all"]["synchronizes"] == ""
    assert found["vdnn-all"]["offloaded_bytes"] > 0
    assert driver.sync_mode == 0
    streams.sanitized()
    assert "nothing found" in capsys.readouterr().out


def test_a_step_that_waits_is_told_with_its_place(driver: Driver, tmp_path: Path) -> None:
    @contextlib.contextmanager
    def looks(setup: Any) -> Iterator[Any]:
        setup.model.register_forward_hook(lambda module, args, output: output.sum().item() and None)
        yield contextlib.nullcontext

    with mock.patch.dict(METHODS, {"no offload": looks}):
        found = streams._synchronizes(Session(False, tmp_path, 100), "no offload")
    assert "synchronizing" in found["synchronizes"]
    assert "Error" in found["where"]


def test_gradients_on_a_card(driver: Driver, tmp_path: Path) -> None:
    (row,) = part("gradients", tmp_path).values()
    assert row["reproducible"]
    assert all(row[policy] == {"exact": True, "differs": ""} for policy in OURS)


class _Span:
    """An event of the profiler's, with the names that torch's have."""

    def __init__(self, name: str, start: int, duration: int) -> None:
        values = {"name": name, "start_ns": start, "duration_ns": duration}
        values["device_type"] = torch.autograd.DeviceType.CUDA  # type: ignore[assignment]
        for key, value in values.items():
            assert hasattr(torch._C._autograd._KinetoEvent, key)
            setattr(self, key, lambda value=value: value)


def test_methods_compared_on_a_card(driver: Driver, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spans = [_Span("Memcpy DtoH (Device -> Pinned)", 0, 10), _Span("gemm", 5, 10), _Span("Memset", 0, 99)]
    recorded = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: spans))
    profile = mock.MagicMock()
    profile.return_value.__enter__.return_value.profiler = recorded
    with mock.patch("torch.profiler.profile", profile):
        rows = {row["method"]: row for row in part("compared", tmp_path)}
    ours = rows["vdnn-all"]["measured"]
    assert (ours["link_busy_ns"], ours["link_busy_while_computing_ns"]) == (10, 5)
    assert ours["over_ideal"] > 0
    assert rows["vdnn-all"]["predicted"]["iteration_time_ns"] > 0
    assert rows["save_on_cpu"]["measured"]["slowdown"] > 0
    assert "torchtune cannot be imported" in rows["torchtune"]["not_run"]
    assert "vdnn-all" in capsys.readouterr().out


def test_a_profiler_without_rights_and_a_dead_device_take_only_their_own_rows(driver: Driver, tmp_path: Path) -> None:
    calls = iter(range(100))

    def clear() -> None:
        if next(calls) == 1:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    run = Session(False, tmp_path, 100)
    rows: list[Any] = []
    run.keep = rows.append
    times = {"step_s": 1.0, "forward_s": 0.1, "backward_s": 0.1}
    with mock.patch.object(compared, "_clear", clear), mock.patch.object(compared, "_timed", return_value=times):
        plain, ours, *others = compared.measure(run)
    assert plain["measured"]["step_s"] == 1.0
    assert "overlap_failed" in ours["measured"]
    assert ours["measured"]["offloaded_bytes"] >= 0
    assert {row["not_run"][:32] for row in others} == {"the device failed in vdnn-all: C"}
    assert rows


def test_the_history_of_an_allocator_is_replayed(driver: Driver, tmp_path: Path) -> None:
    work = TINY.load()
    trace = vdnn.capture(work, optimizer="sgd")
    driver.snapshot = step_snapshot(trace, (), 10**9)
    found = part("history", tmp_path)
    assert found["vdnn-all"]["events"] > 0
    assert found["no offload"]["replayed"]
    assert (tmp_path / "history-vdnn-all.pickle.gz").stat().st_size > 0


def test_the_tests_of_a_card_are_run(driver: Driver, tmp_path: Path) -> None:
    with mock.patch("subprocess.run", return_value=subprocess.CompletedProcess([], 0, "12 passed", "")) as run:
        assert part("cases", tmp_path) == {"returned": 0, "said": "12 passed"}
    assert "gpu and not slow" in run.call_args.args[0]


def test_a_part_that_fails_keeps_what_it_had_and_a_process_that_dies_stops_no_other(tmp_path: Path) -> None:
    def fails(run: Session) -> None:
        run.keep({"first": 1})
        raise RuntimeError("in the second")

    with mock.patch.dict(PARTS, {"limits": fails}):
        assert main(["--virtual", "-o", str(tmp_path), "--part", "limits"]) == 1
    found = json.loads((tmp_path / "limits.json").read_text())
    assert (found["error"], found["result"]) == ("RuntimeError: in the second", {"first": 1})
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "name = sys.argv[sys.argv.index('--part') + 1]\n"
        "open(f'{sys.argv[2]}/{name}.json', 'w').write(json.dumps({'result': name}))\n"
        "name == 'limits' and os.abort()\n"
    )
    with mock.patch.object(check, "__file__", str(script)):
        assert main(["--virtual", "-o", str(tmp_path), "--part", "limits", "--part", "cases"]) == 1
    died, lived = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("limits", "cases"))
    assert "ended with -6" in died["error"]
    assert died["result"] == "limits"
    assert lived == {"result": "cases"}
