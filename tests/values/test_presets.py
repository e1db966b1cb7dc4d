"""The GPUs that vdnn knows: their ids, their numbers' sources, and files of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from vdnn.errors import FormatError, UsageError
from vdnn.values import Hardware, hardware, loads, preset_ids, save
from vdnn.values.codec import dumps

IDS = [
    *("titan-x", "p100", "v100", "t4", "rtx3090", "rtx4090", "rtx5090", "l4", "a10g"),
    *("a100-40", "a100-80", "h100-pcie", "h100", "h200", "b200", "gh200"),
    *("a100-40-pcie", "a100-80-pcie", "v100-pcie", "p4"),
]
NUMBERS = [
    *("memory_bytes", "peaks", "dram_bytes_per_s", "d2h_bytes_per_s", "h2d_bytes_per_s", "duplex_bytes_per_s"),
    *("link_latency_ns", "launch_ns", "kernel_ns", "nvlink_bytes_per_s", "efficiencies"),
    *("sm_count", "l2_bytes", "power_watts", "process_nm"),
    *("context_bytes", "cublas_workspace_bytes"),
]


def test_the_ids_are_those_of_the_documentation() -> None:
    assert preset_ids() == tuple(sorted(IDS))


@pytest.mark.parametrize("gpu", IDS)
def test_every_number_of_a_preset_has_a_source(gpu: str) -> None:
    machine = hardware(gpu)
    machine.check()
    assert machine.id == gpu
    sources = {source.field: source.text for source in machine.sources}
    assert sorted(sources) == sorted([*NUMBERS, *(["cudnn_bytes"] if machine.cudnn_bytes else [])])
    assert all(len(text) > 10 for text in sources.values())
    assert loads(dumps(machine)) == machine


@pytest.mark.parametrize("gpu", IDS)
def test_a_preset_s_rates_are_plausible(gpu: str) -> None:
    """No rate is off by a factor of a thousand, and both directions share the link."""
    machine = hardware(gpu)
    assert 7 * 2**30 < machine.memory_bytes < 300 * 2**30
    assert 5e12 < machine.peak("float32") <= machine.peak("float16") < 5e15
    assert 1.5e11 < machine.dram_bytes_per_s < 1e13
    assert 1e10 < machine.h2d_bytes_per_s < machine.dram_bytes_per_s
    assert machine.h2d_bytes_per_s <= machine.duplex_bytes_per_s <= machine.d2h_bytes_per_s + machine.h2d_bytes_per_s


def test_titan_x_has_the_numbers_of_the_paper() -> None:
    machine = hardware("titan-x")
    assert machine.memory_bytes == 12 * 2**30
    assert machine.peak("float32") == 7 * 10**12
    assert machine.dram_bytes_per_s == 336 * 10**9
    assert machine.d2h_bytes_per_s == machine.h2d_bytes_per_s == 12_800_000_000
    assert machine.peak("bfloat16") == machine.peak("float32")


def test_consumer_cards_have_the_tensor_rate_with_fp32_accumulation() -> None:
    assert hardware("rtx3090").peak("float16") == 71_200_000_000_000
    assert hardware("rtx4090").peak("bfloat16") == 165_200_000_000_000


def test_data_centre_cards_have_dense_rates() -> None:
    assert hardware("a100-80").peak("bfloat16") == 312 * 10**12
    assert hardware("h100").peak("bfloat16") == 989_500_000_000_000
    assert hardware("H200").memory_bytes == 143771 * 2**20


def test_an_unknown_gpu_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(UsageError, match=r"unknown GPU 'rtx4080': did you mean rtx4090"):
        hardware("rtx4080")


TOML = """
id = "mine"
name = "My card"
memory_bytes = 8_000_000_000
dram_bytes_per_s = 100_000_000_000
d2h_bytes_per_s = 6_000_000_000
h2d_bytes_per_s = 6_000_000_000
duplex_bytes_per_s = 6_000_000_000
link_latency_ns = 0
launch_ns = 0
kernel_ns = 0
[peaks]
float32 = 1_000_000_000_000
[efficiencies]
conv = { compute_permille = 500, memory_permille = 700 }
"""


def test_a_machine_of_one_s_own_comes_from_toml_or_json(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TOML)
    machine = hardware(path)
    assert isinstance(machine, Hardware)
    assert machine.efficiencies[0].compute_permille == 500
    assert hardware(save(machine, tmp_path / "mine.json")) == machine
    assert hardware(machine) is machine


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory_bytes = 8_000_000_000", "memory_bytes = 0", "memory_bytes is 0, it must be more than 0"),
        ("memory_bytes = 8_000_000_000", "", "lacks the field 'memory_bytes'"),
        ("launch_ns = 0", "launch_ns = -1", "launch_ns is -1, it must not be negative"),
        ("launch_ns = 0", "launch_ns = 1.5", "launch_ns should be a whole number"),
        ("float32 =", "float16 =", "has no float32 peak"),
        ("= 500", "= 5000", "efficiency of conv is not in 1"),
        ("[peaks]", "[peak]", "unknown field 'peak'"),
        ("[peaks]", "[peaks", "is not TOML"),
        ("conv = {", "conv = 3 #", "must be a table"),
        ("conv = { compute_permille = 500,", "conv = {", "lacks the field 'compute_permille'"),
    ],
)
def test_a_wrong_hardware_file_says_what_is_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TOML.replace(old, new, 1))
    with pytest.raises(FormatError, match=rf"mine\.toml.*{message}"):
        hardware(path)
    with pytest.raises(FormatError, match=r"cannot read .*none\.toml"):
        hardware(tmp_path / "none.toml")
