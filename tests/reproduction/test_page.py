"""What the results in results/paper/ must be: complete, as the file contract says, and with a reason for each miss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vdnn.errors import UsageError
from vdnn.reproduction import NETWORKS, differences
from vdnn.reproduction.differences import Difference, read_figure
from vdnn.reproduction.networks import DEEP, POLICIES
from vdnn.reproduction.page import BEGIN, END, readme_table, reason_of, write_readme

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "paper"

FIGURES = {
    "fig4": {"weights_mib", "feature_maps_mib", "gradient_maps_mib", "workspace_mib"},
    "fig12": {"all_mib", "conv_mib"},
    "fig14": set(POLICIES),
}


@pytest.mark.parametrize("figure", FIGURES)
def test_files_have_every_network_and_column(figure: str) -> None:
    data = read_figure(RESULTS, figure)
    assert set(data) == set(NETWORKS)
    assert all(set(row) == FIGURES[figure] for row in data.values())


def test_memory_and_passes_have_every_network() -> None:
    memory = read_figure(RESULTS, "fig11")
    assert set(memory) == set(NETWORKS) == set(read_figure(RESULTS, "dyn"))
    assert all(set(row) == set(POLICIES) for row in memory.values())
    assert all(set(pair) == {"max_mib", "avg_mib"} for row in memory.values() for pair in row.values())
    deep = read_figure(RESULTS, "fig15")
    assert set(deep) == set(DEEP)
    assert all(set(row) == {"gpu_mib", "cpu_mib", "base_mib"} for row in deep.values())


def test_every_miss_has_a_reason_and_stands_on_the_page() -> None:
    page = (RESULTS / "README.md").read_text()
    misses = [d for d in differences(RESULTS) if d.missed]
    assert misses
    for miss in misses:
        assert reason_of(miss) != "No reason is known."
        assert f"{miss.figure}, {miss.network}" in page


def test_a_miss_without_a_reason_says_so() -> None:
    unknown = Difference("Fig. 12", "AlexNet(128)", "all_mib", 349, 400, 0.01)
    assert unknown.missed
    assert reason_of(unknown) == "No reason is known."


def test_differences_are_relative_or_absolute() -> None:
    d = Difference("Fig. 14", "VGG-16(64)", "dyn", 0.5, 0.56, 0.05, True)
    assert d.missed
    assert d.text == "+0.060"
    relative = replace(d, absolute=False, tolerance=0.15)
    assert not relative.missed
    assert relative.text == "+12.0 %"
    assert not replace(d, tolerance=None).missed


def test_the_readme_s_table_is_the_one_of_the_results() -> None:
    text = (ROOT / "README.md").read_text()
    inside = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert inside == readme_table(RESULTS), "run: vdnn reproduction results/paper --into README.md"


def test_the_table_goes_between_the_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_readme(RESULTS, readme)
    assert readme.read_text() == f"before\n{BEGIN}\n{readme_table(RESULTS)}\n{END}\nafter\n"
    readme.write_text("no marks")
    with pytest.raises(UsageError, match="no lines"):
        write_readme(RESULTS, readme)
