"""Figures show the numbers they are given: bars, curves and labels are read back from the axes."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from vdnn.errors import UsageError
from vdnn.reporting.levels import memory_levels, thinned
from vdnn.reporting.plots import (
    layers_figure,
    memory_figure,
    policies_figure,
    prediction_figure,
    save_figure,
    streams_figure,
)
from vdnn.reporting.plots.layers import thin_labels
from vdnn.reporting.summaries import layer_shares
from vdnn.values import MemoryEvent, Timeline

GIB = 2**30


def texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def running_peak(timeline):
    """The peak of the events, added up one by one."""
    held = peak = sum(nbytes for _, nbytes in timeline.resident)
    for event in timeline.memory:
        if event.where == "device":
            held += event.nbytes
            peak = max(peak, held)
    return peak


def heights(collection):
    return max(path.vertices[:, 1].max() for path in collection.get_paths())


def test_the_peak_of_the_memory_figure_is_the_peak_of_the_events(example):
    figure = memory_figure(example.offloaded, example.baseline, 6 * GIB)
    for axes, run in zip(figure.axes, (example.baseline, example.offloaded), strict=True):
        peak = running_peak(run.timeline) / GIB
        (marker,) = [line for line in axes.lines if line.get_label() == "peak"]
        assert marker.get_ydata()[0] == pytest.approx(peak)
        assert max(heights(c) for c in axes.collections) == pytest.approx(peak)
        assert f"{peak:.2f} GiB" in axes.get_title(loc="left")
    assert "capacity 6.00 GiB" in texts(figure)


def test_the_stack_of_categories_adds_up_to_the_total(example):
    figure = memory_figure(example.baseline)
    levels = memory_levels(example.baseline.timeline)
    stacks = {c.get_label(): c for c in figure.axes[0].collections}
    assert set(stacks) == set(levels.categories)
    last = max(heights(c) for c in stacks.values())
    assert last == pytest.approx(levels.total.max() / GIB)
    curve = next(line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-post")
    assert np.allclose(curve.get_ydata()[:-1], levels.total / GIB)


def test_a_peak_that_lasts_no_time_is_a_peak():
    events = tuple(MemoryEvent(5, 0, n, "temporary", "device") for n in (100, -100))
    levels = memory_levels(Timeline(memory=events, resident=(("parameter", 7),)))
    assert levels.total.tolist() == [7, 107, 7]
    assert levels.peak_index == 1


def test_memory_of_the_host_is_not_memory_of_the_device(example):
    timeline = example.offloaded.timeline
    assert memory_levels(timeline, "host").categories == ("pinned",)
    assert "pinned" not in memory_levels(timeline).categories
    assert memory_levels(timeline, "host").total.max() == example.offloaded.host_peak_bytes


def test_thinning_keeps_the_peak_and_the_ends():
    rng = np.random.default_rng(0)
    events = tuple(
        MemoryEvent(i, i, int(n), "activation", "device") for i, n in enumerate(rng.integers(-9, 10, 50_000))
    )
    whole = memory_levels(Timeline(memory=events, resident=(("parameter", 10**6),)))
    few = thinned(whole, 3000)
    assert len(few.times_ns) <= 3003
    assert few.total.max() == whole.total.max()
    assert few.total.min() == whole.total.min()
    assert few.total[-1] == whole.total[-1]


def test_a_capacity_far_above_is_told_and_not_drawn(example):
    axes = memory_figure(example.offloaded, capacity_bytes=80 * GIB).axes[0]
    assert "capacity 80.00 GiB, out of view" in axes.get_title(loc="left")
    assert axes.get_ylim()[1] < 10


def test_the_end_of_forward_is_marked(example):
    axes = memory_figure(example.baseline).axes[0]
    verticals = [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
    assert any(x == pytest.approx(example.baseline.forward_time_ns / 1e6) for x in verticals)
    assert "forward" in [text.get_text() for text in axes.texts]


def test_every_span_and_every_stall_is_in_the_gantt_chart(example):
    figure = streams_figure(example.offloaded)
    (axes,) = figure.axes
    timeline = example.offloaded.timeline
    drawn = sum(len(c.get_paths()) for c in axes.collections)
    assert drawn == len(timeline.spans) + len(timeline.stalls)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["host", "compute", "offload", "prefetch"]
    assert {"stall: release", "stall: prefetch", "offload (D2H)", "forward"} <= set(texts(figure))
    busy = sum(s.end_ns - s.start_ns for s in timeline.spans if s.stream == "compute") / axes.dataLim.x1 / 1e6
    assert f"{100 * busy:.0f} % busy" in [text.get_text() for text in axes.texts]


def test_a_stretch_of_the_gantt_chart_has_a_panel_of_its_own(example):
    figure = streams_figure(example.offloaded, (10**8, 2 * 10**8))
    assert figure.axes[1].get_xlim() == (100, 200)
    with pytest.raises(UsageError, match="cannot show"):
        streams_figure(example.offloaded, (2, 2))


def test_policies_have_a_bar_each_and_headings_by_group(policies):
    figure = policies_figure(policies, 12 * GIB)
    left, right = figure.axes
    widths = [bar.get_width() for container in left.containers for bar in container]
    assert widths == pytest.approx([r.peak_requested_bytes / GIB for r in policies])
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert [label for label in labels if label.startswith("batch")] == ["batch 64", "batch 128", "batch 256"]
    assert len(labels) == len(policies) + 3
    whole = sum(bar.get_width() for container in right.containers for bar in container)
    assert whole == pytest.approx(sum(r.iteration_time_ns for r in policies) / 1e6)
    assert [t.get_text() for t in right.texts].count("1.40×") == 3
    assert {"does not fit", "capacity 12.00 GiB", "stalls"} <= set(texts(figure))


def test_what_no_policy_knows_is_two_dashes(policies):
    results = [replace(r, iteration_time_ns=None, stall_ns=None) for r in policies[:4]]
    figure = policies_figure(results)
    assert [t.get_text() for t in figure.axes[1].texts] == ["--"] * 4


def test_layers_show_all_bytes_of_the_plan(example):
    figure = layers_figure(example.plan, example.trace)
    offloaded, kept = figure.axes[0].containers
    assert len(offloaded) == len(kept) == 40
    total = sum(bar.get_height() for bar in offloaded) * 2**20
    assert total == pytest.approx(example.plan.offloaded_bytes)
    shares = layer_shares(example.plan, example.trace)
    assert kept[1].get_height() * 2**20 == shares[1].kept_bytes


def test_names_of_many_layers_are_thinned_evenly():
    places, labels = thin_labels([f"block.{i}#0" for i in range(1000)], 50)
    assert len(places) <= 50
    assert len({b - a for a, b in itertools.pairwise(places)}) == 1
    assert labels[1] == f"block.{places[1]}"


def test_predictions_are_points_beside_the_diagonal(policies):
    pairs = [
        (r, replace(r, source="measured", peak_requested_bytes=int(r.peak_requested_bytes * 1.02))) for r in policies
    ]
    pairs[0] = (pairs[0][0], replace(pairs[0][1], iteration_time_ns=None))
    figure = prediction_figure(pairs, band=0.05)
    left, right = figure.axes
    points = [(x, y) for line in left.lines if line.get_marker() not in ("", "None") for x, y in line.get_xydata()]
    assert len(points) == len(policies)
    assert all(y / x == pytest.approx(1 / 1.02) for x, y in points)
    assert left.get_title(loc="left") == "12 of 12 within ±5 %"
    assert right.get_title(loc="left") == "11 of 11 within ±5 %, 1 not known"
    assert {"±5 %", "equal", "vdnn-all"} <= set(texts(figure))


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_equal_values_give_equal_files(example, tmp_path, suffix):
    first = save_figure(memory_figure(example.offloaded, example.baseline), tmp_path / f"a{suffix}")
    second = save_figure(memory_figure(example.offloaded, example.baseline), tmp_path / f"b{suffix}")
    assert first.read_bytes() == second.read_bytes()
    assert b"Software" not in first.read_bytes()


def test_the_readers_own_settings_change_nothing_and_are_left_alone(example, tmp_path):
    import matplotlib

    plain = save_figure(layers_figure(example.plan, example.trace), tmp_path / "a.png").read_bytes()
    with matplotlib.rc_context({"font.size": 20.0, "axes.facecolor": "red", "savefig.dpi": 50}):
        own = save_figure(layers_figure(example.plan, example.trace), tmp_path / "b.png").read_bytes()
        assert matplotlib.rcParams["font.size"] == 20.0
    assert own == plain


@pytest.mark.parametrize("draw", [memory_figure, streams_figure])
def test_a_result_without_a_timeline_is_a_clear_error(example, draw):
    with pytest.raises(UsageError, match="run it with a timeline"):
        draw(replace(example.offloaded, timeline=None))


def test_other_bad_input_is_a_clear_error(policies, example, tmp_path):
    with pytest.raises(UsageError, match="no results"):
        policies_figure([])
    with pytest.raises(UsageError, match="no pairs"):
        prediction_figure([])
    with pytest.raises(UsageError, match="band is 2"):
        prediction_figure([(policies[0], policies[0])], band=2)
    with pytest.raises(UsageError, match=r"must end in \.png"):
        save_figure(layers_figure(example.plan, example.trace), tmp_path / "a.jpeg")


def loaded_after(statement, *names):
    code = f"import sys; {statement}; print([n for n in {names!r} if n in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_reporting_loads_neither_torch_nor_matplotlib_and_plots_no_pyplot():
    assert loaded_after("import vdnn.reporting", "torch", "matplotlib") == "[]"
    assert loaded_after("import vdnn.reporting.plots", "torch", "matplotlib.pyplot") == "[]"
    assert loaded_after("import matplotlib.pyplot", "matplotlib.pyplot") == "['matplotlib.pyplot']"
