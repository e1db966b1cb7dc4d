"""Verdicts on whether published rows fit."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from vdnn.analysis.synthetic import conv_chain
from vdnn.fidelity.memory import LADDER, Verdict, judged, memory_lines, next_batch, read_verdicts
from vdnn.fidelity.rows import StepRow
from vdnn.sim.allocator_step import step_memory
from vdnn.sim.workspaces import with_libraries
from vdnn.values import Trace, hardware

GIB = 2**30
RIGHT = Verdict("resnet50", "resnet", "rtx3090", 256, 384, 20 * GIB, 23 * GIB, 19 * GIB, 22 * GIB, 22 * GIB, 24 * GIB)


def test_the_next_batch_is_the_one_that_was_tried_before() -> None:
    assert [next_batch(batch) for batch in (512, 384, 1, 100)] == [None, 512, 2, None]
    assert all(next_batch(low) == high for high, low in itertools.pairwise(LADDER))


def test_a_verdict_is_right_if_both_answers_are() -> None:
    assert RIGHT.way == "right"
    assert not RIGHT.naively_right  # 22 GiB of live bytes would go into 24
    assert replace(RIGHT, least_bytes=23 * GIB).way == "tight"
    assert replace(RIGHT, next_least_bytes=21 * GIB).way == "loose"


def test_the_table_counts_the_verdicts_and_names_the_wrong_ones_with_a_reason(tmp_path: Path) -> None:
    near = replace(RIGHT, model="near", next_least_bytes=22 * GIB - 1)
    far = replace(RIGHT, model="far", next_least_bytes=15 * GIB)
    rows = [RIGHT, replace(RIGHT, model="resnet34"), near, far]
    (tmp_path / "memory.json").write_text(json.dumps({"verdicts": [asdict(v) for v in rows]}))
    assert read_verdicts(tmp_path) == rows
    lines = memory_lines(tmp_path)
    assert lines[2] == "| training, rtx3090 | 4 | 50.0% | 2 | 0 | 0.0% |"
    assert next(line for line in lines if line.startswith("| near")).endswith("are not modelled |")
    assert "7.0 GiB that the capture does not see" in next(line for line in lines if line.startswith("| far"))
    assert memory_lines(tmp_path / "nowhere") == []


class Made:
    """Captures of a network of which each batch takes as much more."""

    def make(self, row: StepRow) -> Trace | None:
        return conv_chain(batch=row.batch) if row.model == "known" else None


def test_rows_are_judged_by_the_least_memory_that_the_allocators_model_runs_them_in() -> None:
    rows = [
        StepRow("train", "rtx3090", "known", 256, 224, 1),
        StepRow("train", "rtx3090", "known", 512, 224, 1),
        StepRow("train", "rtx3090", "gone", 256, 224, 1),
        StepRow("infer", "rtx3090", "known", 256, 224, 1),
    ]
    told = []
    data = judged(rows, Made(), lambda *args: told.append(args))  # type: ignore[arg-type]
    (verdict,) = [Verdict(**row) for row in data["verdicts"]]
    assert (verdict.batch, verdict.next_batch, data["without_capture"], len(told)) == (256, 384, 1, 2)
    step = with_libraries(conv_chain(batch=256), hardware("rtx3090"))
    assert step_memory(step, (), verdict.least_bytes).fits
    assert not step_memory(step, (), verdict.least_bytes * 254 // 256).fits
    assert verdict.next_least_bytes == pytest.approx(verdict.least_bytes * 1.5, rel=0.15)
