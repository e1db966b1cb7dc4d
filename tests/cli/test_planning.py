"""`plan --budget`, `--explain` and `advise`: numbers and reasons on stdout, mistakes in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import vdnn
from vdnn.analysis.synthetic import conv_chain
from vdnn.reporting.rows import COLUMNS
from vdnn.values import save


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("planning") / "chain.json.gz"
    save(conv_chain(batch=256, channels=(32, 32, 64, 64), size=64), path)
    return str(path)


def test_explain_says_by_module_what_happens_when_and_why(chain: str) -> None:
    done = vdnn("plan", chain, "--gpu", "rtx4090", "--budget", "450MiB", "--explain")
    assert done.returncode == 0, done.stderr
    assert "of the best" in " ".join(done.stdout.split())
    assert "the budget does not ask for it" in done.stdout
    rows = json.loads(vdnn("plan", chain, "--gpu", "rtx4090", "--budget", "450MiB", "--explain", "--json").stdout)
    moved = [row for row in rows["entries"] if row["action"] == "offload"]
    again = [row for row in rows["entries"] if row["action"] == "recompute"]
    assert moved or again
    for row in moved:
        assert 0 < row["out_ns"] <= row["back_ns"]
    for row in again:
        assert "fetching it takes" in row["why"]
    assert all(row["why"] and row["nbytes"] > 0 and row["storages"] > 0 for row in rows["entries"])


def test_an_impossible_budget_has_exit_code_three_and_names_the_least(chain: str) -> None:
    done = vdnn("plan", chain, "--gpu", "rtx4090", "--budget", "1MiB")
    assert done.returncode == 3
    assert "the least is" in done.stderr
    assert "filled by" in done.stderr
    # what it names is possible
    least = done.stderr.split("the least is ")[1].split(",")[0].replace(" ", "")
    again = vdnn("plan", chain, "--gpu", "rtx4090", "--budget", least)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(("budget", "words"), [("lots", "lots"), ("0", "more than 0 bytes"), ("-3GiB", "-3GiB")])
def test_a_budget_that_is_none_is_a_mistake(chain: str, budget: str, words: str) -> None:
    done = vdnn("plan", chain, "--gpu", "rtx4090", f"--budget={budget}")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_hardware_without_a_link_is_a_mistake(chain: str, tmp_path: Path) -> None:
    from vdnn.values import hardware

    machine = tmp_path / "unlinked.json"
    save(hardware("rtx4090"), machine)
    data = json.loads(machine.read_text())
    data["value"]["d2h_bytes_per_s"] = 0
    machine.write_text(json.dumps(data))
    done = vdnn("plan", chain, "--gpu", str(machine), "--budget", "450MiB")
    assert done.returncode == 2, done.stderr
    assert "d2h_bytes_per_s is 0" in done.stderr


def test_advise_says_for_each_gpu_what_fitting_costs(chain: str, tmp_path: Path) -> None:
    picture = tmp_path / "gpus.png"
    gpus = ("--gpu", "rtx4090", "--gpu", "t4")
    done = vdnn("advise", chain, *gpus, "--json", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert picture.exists()
    rows = {row["gpu"]: row for row in json.loads(done.stdout)}
    assert set(rows) == {"rtx4090", "t4"}
    for row in rows.values():
        assert row["fits"]
        assert row["how"] == "as it is"
        assert row["slowdown"] == 1
        assert row["iteration_time_ns"] == row["time_ns"]
        assert {*COLUMNS} <= {*row}
        assert {*COLUMNS} <= {*row["baseline"]}
    assert rows["rtx4090"]["time_ns"] < rows["t4"]["time_ns"]
    text = vdnn("advise", chain, *gpus)
    assert text.stdout.index("rtx4090") < text.stdout.index("t4")


def test_advise_plans_where_the_step_does_not_fit_and_says_what_is_missing_where_nothing_does() -> None:
    from dataclasses import replace

    from vdnn.advising import advise
    from vdnn.policies import Options
    from vdnn.values import hardware

    trace = conv_chain(batch=256, channels=(32, 32, 64, 64), size=64)
    card = hardware("rtx4090")
    machines = [
        replace(card, id=name, memory_bytes=card.context_bytes + size)
        for name, size in (("large", 1 << 33), ("small", 480 << 20), ("tiny", 1 << 20))
    ]
    rows = advise(trace, None, machines, Options())
    assert [row.gpu for row in rows] == ["large", "small", "tiny"]
    large, small, tiny = rows
    assert large.how == "as it is"
    assert small.fits
    assert set(small.how.split("+")) & {"offload", "recompute"}
    assert small.slowdown is not None
    assert small.slowdown >= 1
    assert small.bound_ns is not None
    assert small.bound_ns <= (small.time_ns or 0)
    assert not tiny.fits
    assert tiny.needs_bytes > tiny.available_bytes == 1 << 20
    assert tiny.slowdown is None


def test_a_trace_that_is_of_another_step_than_asked_for_is_an_error(chain: str) -> None:
    """The batch size and the model's options were read and left aside: the numbers were those of the trace's batch."""
    for asked in (
        *(("--batch", "7"), ("--precision", "bf16"), ("--optimizer", "adamw"), ("-O", "image_size=64")),
        *(("--batch", "32"), ("--precision", "amp"), ("--optimizer", "none")),  # what a command has by default
    ):
        done = vdnn("simulate", chain, "--gpu", "rtx4090", *asked)
        assert done.returncode == 2, done.stderr
        assert "is a trace" in done.stderr
        assert asked[1] in done.stderr
    done = vdnn("plan", chain, "--gpu", "rtx4090", "--device", "cpu")
    assert "is a trace of device cuda, not cpu" in done.stderr
    assert vdnn("simulate", chain, "--gpu", "rtx4090", "--batch", "256", "--optimizer", "sgd").returncode == 0


def test_options_that_no_longer_change_a_plan_are_an_error_beside_it(chain: str, tmp_path: Path) -> None:
    made = tmp_path / "plan.json"
    assert vdnn("plan", chain, "--gpu", "rtx4090", "-o", str(made)).returncode == 0
    done = vdnn("simulate", chain, "--gpu", "rtx4090", "--plan", str(made), "--rules", "event")
    assert done.returncode == 2
    assert f"--rules no longer changes the plan in {made}" in done.stderr
    assert vdnn("simulate", chain, "--gpu", "rtx4090", "--plan", str(made)).returncode == 0


def test_every_command_takes_cudas_context_off_the_cards_memory(chain: str) -> None:
    from vdnn.values import hardware

    card = hardware("rtx4090")
    row = json.loads(vdnn("advise", chain, "--gpu", "rtx4090", "--json").stdout)[0]
    assert row["available_bytes"] == card.available_bytes == card.memory_bytes - card.context_bytes
    assert row["memory_bytes"] == card.memory_bytes
    left = f"{card.available_bytes / 2**30:.2f}"
    assert left in vdnn("advise", chain, "--gpu", "rtx4090").stdout
    shown = vdnn("compare", chain, "--gpu", "rtx4090", "--policy", "vdnn-dyn").stdout
    assert f"of {left} GiB: fits" in " ".join(shown.split())
    run = vdnn("run", "demo:cnn", "--batch", "2", "--steps", "2", "--gpu", "rtx4090", "--device", "virtual")
    assert f"fits by requested bytes in {left} GiB" in " ".join(run.stdout.split())


def test_what_is_left_out_of_a_comparison_is_said_once_for_each_reason(tmp_path: Path) -> None:
    """`checkpoint` and `checkpoint-offload` have one reason, which was printed twice, without their names."""
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef make(batch):\n    return torch.nn.Linear(8, 8), torch.randn(batch, 8)\n"
    )
    done = vdnn("compare", "mine.py:make", "--batch", "2", "--gpu", "t4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "no repeated blocks" in line]
    assert len(lines) == 1
    assert lines[0].startswith("vdnn: left out checkpoint, checkpoint-offload")
    assert "recompute" in done.stdout


def test_the_planner_has_a_row_where_the_step_does_not_fit(chain: str, tmp_path: Path) -> None:
    from dataclasses import replace

    from vdnn.values import hardware

    card = hardware("rtx4090")
    small = tmp_path / "small.json"
    save(replace(card, id="small", memory_bytes=card.context_bytes + (700 << 20)), small)
    rows = json.loads(vdnn("compare", chain, "--gpu", str(small), "--json").stdout)
    planned = next(row for row in rows if row["policy"] == "budget")
    assert not rows[0]["fits"]
    assert planned["fits"]
    ours = [row for row in rows if row["fits"] and row["policy"].startswith("vdnn")]
    assert ours
    assert planned["iteration_time_ns"] <= min(row["iteration_time_ns"] for row in ours)
    assert "budget" not in vdnn("compare", chain, "--gpu", "rtx4090").stdout


def test_an_explained_plan_has_the_numbers_of_the_step_too(chain: str) -> None:
    done = vdnn("plan", chain, "--gpu", "rtx4090", "--policy", "vdnn-all", "--explain", "--json")
    row = json.loads(done.stdout)
    assert {*COLUMNS} <= {*row}
    assert {*COLUMNS} <= {*row["baseline"]}
    assert row["policy"] == "vdnn-all"
    assert row["baseline"]["policy"] == "none"


def test_a_policy_of_several_that_has_no_plan_is_left_out_and_alone_it_is_an_error(chain: str, tmp_path: Path) -> None:
    from dataclasses import replace

    from vdnn.values import hardware

    card = hardware("rtx4090")
    tiny = tmp_path / "tiny.json"
    save(replace(card, id="tiny", memory_bytes=card.context_bytes + (64 << 20)), tiny)
    asked = ("compare", chain, "--gpu", str(tiny), "--policy", "vdnn-dyn")
    alone = vdnn(*asked)
    assert alone.returncode == 3
    assert "vdnn-dyn has no plan with which" in alone.stderr
    beside = vdnn(*asked, "--policy", "vdnn-all")
    assert beside.returncode == 0
    assert "left out vdnn-dyn: vdnn-dyn has no plan" in beside.stderr
    assert "vdnn-all" in beside.stdout
