"""Experiments with the paper's networks, and with sweeps over the link's bandwidth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vdnn.errors import FormatError, UsageError
from vdnn.experiment import read_experiment, run_missing, write_page
from vdnn.experiment.bandwidth import free_from

SWEEP = """
title = "a sweep"
[[bandwidth]]
title = "links"
file = "links.png"
models = [{ model = "demo:cnn", batch = 2, image_size = 32 }]
gpus = ["rtx4090"]
links = [1, 10, 1000]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "try.toml"
    path.write_text(text)
    return path


def test_a_sweep_runs_resumes_and_draws(tmp_path: Path) -> None:
    experiment = read_experiment(written(tmp_path, SWEEP))
    out = tmp_path / "out"
    told: list[tuple[int, int]] = []
    assert run_missing(experiment, out, progress=lambda what, done, total: told.append((done, total))) == (1, 0)
    assert told[0] == (0, 1)
    assert run_missing(experiment, out) == (0, 1)
    write_page(experiment, out)
    assert (out / "links-fp32.png").stat().st_size > 1000
    (run,) = out.glob("runs/link-*.json")
    points = json.loads(run.read_text())["gpus"]["rtx4090"]["slowdowns"]
    slowdowns = [slowdown for _, slowdown in points]
    assert slowdowns == sorted(slowdowns, reverse=True), "a faster link is never slower here"
    assert "free from" in (out / "README.md").read_text()
    run.unlink()  # as if it had been broken off
    assert run_missing(experiment, out) == (1, 0)


def test_free_is_from_the_bandwidth_on_from_which_nothing_is_slow_again() -> None:
    assert free_from([[1, 3.0], [10, 1.04], [100, 1.0]]) == 10
    assert free_from([[1, 1.0], [10, 1.2], [100, 1.01]]) == 100
    assert free_from([[1, 3.0], [10, 1.2]]) is None


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ('title = "t"\n[reproduction]\nnetworks = ["VGG-17(64)"]', UsageError, "VGG-16"),
        ('title = "t"', FormatError, "runs nothing"),
        (SWEEP.replace("batch = 2, ", ""), FormatError, "a model is written"),
        (SWEEP.replace("[1, 10, 1000]", "[0]"), FormatError, "above 0"),
        (SWEEP.replace("rtx4090", "rtx4091"), UsageError, "rtx4090"),
        (SWEEP + 'policy = "vdnn-some"', UsageError, "vdnn"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path: Path, text: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        read_experiment(written(tmp_path, text))


def test_the_paper_s_experiment_is_valid() -> None:
    experiment = read_experiment(Path(__file__).parents[2] / "experiments" / "paper.toml")
    assert len(experiment.networks) == 10
    assert {sweep.gpus for sweep in experiment.sweeps} == {("p100", "v100", "a100-80", "h100", "gh200", "rtx4090")}


NODE = """
title = "a node"
[[node]]
title = "links"
file = "node.png"
models = [{ model = "demo:cnn", batch = 2, image_size = 32 }]
gpus = ["rtx4090"]
policies = ["save-on-cpu"]
precision = "fp32"
ranks = 4
per_link = [1, 2, 4]
host_memory = "1GiB"
"""


def test_a_node_runs_resumes_and_draws(tmp_path: Path) -> None:
    experiment = read_experiment(written(tmp_path, NODE))
    out = tmp_path / "out"
    assert run_missing(experiment, out) == (1, 0)
    assert run_missing(experiment, out) == (0, 1)
    write_page(experiment, out)
    assert (out / "node.png").stat().st_size > 1000
    (run,) = out.glob("runs/node-*.json")
    policies = json.loads(run.read_text())["policies"]
    assert list(policies) == ["none", "save-on-cpu"]
    slowdowns = [step["slowdown"] for step in policies["save-on-cpu"]]
    assert slowdowns == sorted(slowdowns), "more GPUs on a link are never faster under one plan"
    assert "4 a link" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (NODE.replace("[1, 2, 4]", "[8]"), UsageError, "8 GPUs on a link, of 4"),
        (NODE.replace("[1, 2, 4]", '["two"]'), FormatError, "numbers of GPUs"),
        (NODE.replace('"1GiB"', '"much"'), UsageError, "much"),
        (NODE.replace("save-on-cpu", "save-on-gpu"), UsageError, "save-on-cpu"),
    ],
)
def test_mistakes_in_a_node_are_found_first(tmp_path: Path, text: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        read_experiment(written(tmp_path, text))
