"""Text and JSON say the same, nothing is cut off, and "--" stands for what is not known."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from vdnn.reporting import (
    as_rows,
    as_text,
    difference_rows,
    differences,
    hardware_table,
    layer_shares,
    plan_report,
    plan_rows,
    prediction_table,
    provenance,
    result_report,
    result_rows,
    results_table,
    summarise,
    trace_report,
)
from vdnn.reporting.rows import COLUMNS, by_category, peak_parts
from vdnn.reporting.scale import byte_scale, time_scale
from vdnn.reporting.sheet import Column, Sheet
from vdnn.values import Hardware, Peak, PeakItem, RunResult

DESIGN_COLUMNS = [
    *("model", "batch", "gpu", "policy", "precision", "source"),
    *("peak_requested_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "iteration_time_ns", "stall_ns"),
    *("offloaded_bytes", "prefetched_bytes", "host_peak_bytes", "fits"),
    *("iteration_time_low_ns", "iteration_time_high_ns"),
]


def blank(policy="none", **numbers):
    return RunResult("simulated", "m", 1, "titan-x", policy, "fp32", "", "", **numbers)


def cells(text):
    """Lines of a table, each as its words between gaps of two blanks or more."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()]


def test_rows_have_the_columns_of_the_design_and_again_under_baseline(policies):
    rows = result_rows(policies)
    assert list(COLUMNS) == DESIGN_COLUMNS
    for row in rows:
        assert list(row)[: len(COLUMNS)] == DESIGN_COLUMNS
        assert list(row["baseline"]) == DESIGN_COLUMNS
        assert row["baseline"]["policy"] == "none"
        assert row["baseline"]["batch"] == row["batch"]
    json.dumps(rows, allow_nan=False)


def test_numbers_in_the_table_are_those_of_the_rows(policies):
    batch = policies[4:8]
    lines = {line[0]: line for line in cells(as_text(results_table(batch), 200)) if len(line) > 5}
    for row in result_rows(batch):
        name = row["policy"] + (" (baseline)" if row["policy"] == "none" else "")
        line = lines[name]
        assert f"{row['peak_requested_bytes'] / 2**30:.2f}" in line
        assert f"{row['saving_percent']:.1f}" in line
        assert f"{row['iteration_time_ns'] / 1e6:.2f}" in line
        assert f"{row['slowdown']:.2f}×" in line
        assert f"{row['stall_ns'] / 1e6:.2f}" in line
        assert {True: "yes", False: "no"}[row["fits"]] in line


def test_a_saving_and_a_slowdown_follow_from_result_and_baseline():
    rows = result_rows(
        [
            blank(peak_requested_bytes=1000, iteration_time_ns=100),
            blank("vdnn-all", peak_requested_bytes=250, iteration_time_ns=150),
        ]
    )
    assert (rows[1]["slowdown"], rows[1]["saving_bytes"], rows[1]["saving_percent"]) == (1.5, 750, 75.0)
    assert rows[1]["saving_of"] == "requested"


def test_levels_of_memory_are_never_mixed():
    rows = result_rows(
        [
            blank(peak_requested_bytes=1000, peak_reserved_bytes=2000),
            blank("vdnn-all", peak_allocated_bytes=1, peak_reserved_bytes=500),
        ]
    )
    assert (rows[1]["saving_of"], rows[1]["saving_bytes"]) == ("reserved", 1500)


def test_a_measurement_has_no_simulated_baseline():
    measured = replace(blank("vdnn-all"), source="measured")
    assert result_rows([blank(), measured])[1]["baseline"] is None


def test_what_is_not_known_is_two_dashes_in_text_and_null_in_rows():
    result = blank("vdnn-all", peak_requested_bytes=2**30)
    (row,) = result_rows([result])
    assert row["iteration_time_ns"] is None
    assert row["slowdown"] is None
    line = next(line for line in cells(as_text(results_table([result]), 200)) if line[0] == "vdnn-all")
    assert line == ["vdnn-all", "1.00", *["--"] * 8]
    assert "0.00" not in line


@pytest.mark.parametrize("width", [40, 80, 100, 160])
def test_no_report_is_wider_than_the_terminal_and_no_number_is_cut(policies, example, width):
    text = as_text(results_table(policies), width)
    reports = (
        text,
        as_text(result_report(example.offloaded, example.baseline), width),
        as_text(plan_report(example.plan), width),
        as_text(trace_report(example.trace), width),
    )
    for report in reports:
        assert max(len(line) for line in report.splitlines()) <= width
        assert "…" not in report
    for r in policies:
        assert f"{r.peak_requested_bytes / 2**30:.2f}" in text
        assert f"{r.iteration_time_ns / 1e6:.2f}" in text


def test_every_block_of_a_narrow_table_names_its_rows(policies):
    text = as_text(results_table(policies), 80)
    assert text.count("vdnn-dyn") == 2 * 3
    assert len([line for line in text.splitlines() if re.match(r"vdnn-dyn +256 ", line)]) == 2


def test_words_that_are_too_long_go_on_in_the_next_line():
    name = "a.very.long.module.name." * 5
    text = as_text(Sheet("", (Column("name", words=True), Column("n")), ((name, "123456"),)), 40)
    assert name in "".join(line.split(" ")[0] for line in text.splitlines())
    assert "123456" in text


def test_brackets_in_a_name_are_no_markup():
    assert "[bold]x[/bold]" in as_text(Sheet("", (Column("[GiB]", words=True),), (("[bold]x[/bold]",),)), 80)


def test_what_fills_the_peak_adds_up_to_it(example):
    result = example.offloaded
    assert sum(p.nbytes for p in by_category(result)) == result.peak_requested_bytes
    assert sum(p.nbytes for p in peak_parts(result)) == result.peak_requested_bytes
    assert sum(p.percent for p in peak_parts(result)) == pytest.approx(100)
    assert {p.category for p in by_category(result) if p.lowered} == {"activation"}
    fixed = sum(p.nbytes for p in by_category(result) if not p.lowered)
    assert f"{fixed / 2**20:.1f} MiB" in as_text(result_report(result), 100)


def test_a_report_counts_the_stalls_that_it_does_not_name(example):
    text = as_text(result_report(example.offloaded, top=3), 100)
    assert f"{len(example.offloaded.timeline.stalls) - 3} more" in text


def test_differences_are_measured_minus_predicted_and_explained_by_category():
    predicted = blank(peak_requested_bytes=1000, stall_ns=5, peak_items=(PeakItem("activation", "", 1000),))
    items = (PeakItem("activation", "", 1000), PeakItem("temporary", "", 100))
    measured = replace(predicted, source="measured", peak_requested_bytes=1100, stall_ns=None, peak_items=items)
    found = {d.quantity: d for d in differences(predicted, measured)}
    peak = found["peak_requested_bytes"]
    assert (peak.difference, peak.percent, peak.explanation) == (100, 10.0, "temporaries +100 B")
    assert (found["stall_ns"].difference, found["stall_ns"].explanation) == (None, "not measured")
    assert "iteration_time_ns" not in found
    text = as_text(prediction_table(predicted, measured), 120)
    assert ["peak requested", "1000 B", "1.1 KiB", "+100 B", "+10.0", "temporaries +100 B"] in cells(text)
    rows = difference_rows(predicted, measured, tuple(found.values()))
    assert rows["differences"][0]["difference"] == 100


def test_the_words_of_the_caller_explain_a_difference_first():
    a, b = blank(iteration_time_ns=10), blank(iteration_time_ns=30)
    (d,) = differences(a, b, {"iteration_time_ns": "a CPU is slower than that GPU"})
    assert d.explanation == "a CPU is slower than that GPU"
    assert differences(a, a)[0].explanation == "equal"


def test_plan_rows_add_up_to_the_plan(example):
    rows = plan_rows(example.plan)
    assert sum(r.moved_bytes for r in rows) == example.plan.offloaded_bytes
    assert len(rows) == len(example.plan.entries)
    text = as_text(plan_report(example.plan), 160)
    assert ["features.0#0/1", "offload", "420.0", "end features.0#0", "unpack features.2#0/1", "--"] in cells(text)
    assert "no gain: needed at once" in text
    assert "35 more" in as_text(plan_report(example.plan, top=5), 160)


def test_layers_leave_out_weights_and_follow_the_order_of_forward(example):
    shares = layer_shares(example.plan, example.trace)
    assert [s.layer for s in shares] == [f"features.{i}#0" for i in range(40)]
    assert sum(s.offloaded_bytes for s in shares) == example.plan.offloaded_bytes
    feature_maps = sum(s.nbytes for s in example.trace.storages if s.category == "activation")
    assert sum(s.kept_bytes + s.offloaded_bytes for s in shares) == feature_maps


def test_what_a_plan_does_not_name_follows_its_default(example):
    empty = replace(example.plan, entries=())
    assert sum(s.offloaded_bytes for s in layer_shares(empty, example.trace)) == 0
    rule = replace(empty, default="offload")
    shares = layer_shares(rule, example.trace)
    assert shares[0].kept_bytes == 0
    assert shares[-1].offloaded_bytes == 0, "the model's output is held by someone else"


def test_a_trace_summary_counts_storages_once(example):
    trace = example.trace
    twice = replace(trace, saved=(*trace.saved, trace.saved[1]))
    found, shared = summarise(trace), summarise(twice)
    assert shared.unique_bytes == found.unique_bytes
    assert shared.saved_bytes == found.saved_bytes + trace.saved[1].nbytes
    assert (found.forward_ops, found.backward_ops, found.optimizer_ops) == (40, 40, 0)
    assert sum(m.nbytes for m in found.modules) == found.unique_bytes
    assert found.modules[0].module == "features.0#0"
    assert "35 more" in as_text(trace_report(found, top=5), 100)
    assert as_rows(found.modules)[0]["nbytes"] == found.modules[0].nbytes


def test_hardware_is_listed_with_units():
    machine = Hardware(
        "x1", "Example X1", 12 << 30, (Peak("float32", 6_000 * 10**9),), 336 * 10**9, 12 * 10**9, 12 * 10**9,
        20 * 10**9, 8000, 5000, 2000, (), (),
    )  # fmt: skip
    text = as_text(hardware_table([machine]), 120)
    assert ["x1", "Example X1", "12.0", "12.0", "6.0", "6.0", "336.0", "12.0", "12.0", "20.0"] in cells(text)
    assert "[GiB]" in text


def test_a_scale_never_shows_something_as_nothing():
    scale = byte_scale([5 << 30])
    assert (scale.unit, scale.text(0), scale.text(1), scale.text(-1), scale.text(None)) == (
        "GiB", "0.00", "<0.01", ">-0.01", "--",
    )  # fmt: skip
    assert time_scale([2 * 10**9]).unit == "ms"
    assert time_scale([20 * 10**9]).unit == "s"
    assert byte_scale([]).unit == "GiB"


def test_provenance_knows_version_and_takes_the_rest():
    found = provenance(torch="2.14.1", seed=3)
    assert found.vdnn
    assert found.seed == 3
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", found.commit)
