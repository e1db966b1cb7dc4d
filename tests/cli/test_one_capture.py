"""A command captures each step once, with or without the cache on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_cli import vdnn
from vdnn import api

MODEL = """
import torch
from torch import nn
def make(batch):
    return nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 8)), torch.randn(batch, 8)
"""


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    found: list[object] = []
    real = api.capture

    def counted(work: object, **options: object) -> object:
        found.append(work)
        return real(work, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(api, "capture", counted)
    return found


@pytest.mark.parametrize(
    ("command", "policies", "count"),
    [("compare", ("none", "vdnn-all", "vdnn-conv"), 1), ("simulate", ("vdnn-all",), 1)],
)
def test_a_step_is_captured_once_whatever_the_policies(
    command: str, policies: tuple[str, ...], count: int, captures: list[object]
) -> None:
    asked = [part for name in policies for part in ("--policy", name)]
    done = vdnn(command, "demo:cnn", "--batch", "2", "--gpu", "t4", "--no-cache", *asked)
    assert done.returncode == 0, done.stderr
    assert len(captures) == count


def test_a_model_file_that_changed_is_captured_anew(tmp_path: Path, captures: list[object]) -> None:
    shown = []
    for width in (16, 4096):
        (tmp_path / "mine.py").write_text(MODEL.replace("WIDTH", str(width)))
        done = vdnn("simulate", "mine.py:make", "--batch", "2", "--gpu", "t4", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout)
    assert len(captures) == 2
    assert shown[0] != shown[1]
