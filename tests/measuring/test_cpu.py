"""A CPU measured kernel by kernel: the file that comes of it, and the times made from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vdnn
from vdnn.costs import op_times
from vdnn.costs.measured import measured_times
from vdnn.errors import UsageError
from vdnn.measuring import device, measure_device
from vdnn.measuring.clock import Clock, now_ns
from vdnn.measuring.kernels import Case, cases
from vdnn.values import Hardware, Peak, Timing, hardware, to_toml


def machine(*timings: Timing, page_ns: int = 0, fresh_from_bytes: int = 0) -> Hardware:
    return Hardware(
        id="mine", name="mine", memory_bytes=2**34, peaks=(Peak("float32", 10**11),), dram_bytes_per_s=10**10,
        d2h_bytes_per_s=10**9, h2d_bytes_per_s=10**9, duplex_bytes_per_s=10**9, link_latency_ns=0, launch_ns=0,
        kernel_ns=0, efficiencies=(), sources=(), timings=timings, page_ns=page_ns, fresh_from_bytes=fresh_from_bytes,
    )  # fmt: skip


ADD = (Timing("add", "float32", (100,), 1000), Timing("add", "float32", (1100,), 3000))


SMALL = [Case("mm", (1, 8, 8, 8), lambda: None), Case("add", (12,), lambda: None)]


class Sum(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp() + 1


def times_of(hardware: Hardware, elements: int) -> dict[str, int]:
    x = torch.zeros(elements, requires_grad=True)
    trace = vdnn.capture(Sum(), x, device="cpu")
    return {op.name: ns for op, ns in zip(trace.ops, measured_times(trace, hardware), strict=True)}


@pytest.mark.parametrize(
    ("elements", "ns"),
    # exp reads and writes 4 bytes an element: below the least size, between two, and above the largest
    [(1, 1000), (75, 1000 + 2000 * 500 // 1000), (1375, 30_000)],
)
def test_a_stream_takes_what_lies_between_its_neighbours_by_bytes(elements: int, ns: int) -> None:
    rows = (*ADD, Timing("exp", "float32", (100,), 1000), Timing("exp", "float32", (1100,), 3000))
    assert times_of(machine(*rows), elements)["aten.exp.default"] == ns


def test_an_op_that_was_not_measured_takes_the_time_of_one_of_its_class() -> None:
    assert times_of(machine(*ADD), 1)["aten.exp.default"] == 1000


def test_new_memory_costs_its_page_faults_and_smaller_blocks_do_not() -> None:
    plain = times_of(machine(*ADD), 4096)["aten.exp.default"]
    assert times_of(machine(*ADD, page_ns=7, fresh_from_bytes=4 * 4096), 4096)["aten.exp.default"] == plain + 4 * 7
    assert times_of(machine(*ADD, page_ns=7, fresh_from_bytes=4 * 4096 + 1), 4096)["aten.exp.default"] == plain


def test_a_product_that_was_measured_takes_what_was_measured_and_a_larger_one_more() -> None:
    rows = tuple(Timing("mm", "float32", (1, n, n, n), 1000 + 2 * n**3 // 50) for n in (64, 256))
    trace = vdnn.capture(torch.nn.Linear(256, 256, bias=False), torch.zeros(256, 256), device="cpu")
    found = [ns for op, ns in zip(trace.ops, op_times(trace, machine(*ADD, *rows)), strict=True) if "mm" in op.name]
    assert found
    assert all(abs(ns - (1000 + 2 * 256**3 // 50)) <= 0.01 * ns for ns in found)


def test_a_step_of_a_measured_cpu_is_the_sum_of_its_ops() -> None:
    trace = vdnn.capture(torch.nn.Linear(8, 8), torch.zeros(4, 8), device="cpu", optimizer="sgd")
    mine = machine(*ADD)
    assert vdnn.simulate(trace, None, mine).iteration_time_ns == sum(measured_times(trace, mine))


def test_a_machine_written_as_toml_is_read_back_as_it_was(tmp_path: Path) -> None:
    for gpu in ("titan-x", "h100", "gh200"):
        path = tmp_path / f"{gpu}.toml"
        path.write_text(to_toml(hardware(gpu)))
        assert hardware(path) == hardware(gpu)
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(machine(*ADD, page_ns=7)))
    assert hardware(path) == machine(*ADD, page_ns=7)


def test_a_clock_counts_what_a_call_takes() -> None:
    def busy(ns: int) -> None:
        end = now_ns() + ns
        while now_ns() < end:
            pass

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # CPU time: what others do meanwhile does not count
    try:
        assert 1_000_000 <= Clock(1_000_000).ns(lambda: busy(1_000_000)) <= 1_300_000
    finally:
        torch.set_num_threads(before)


def test_a_call_whose_page_faults_cost_less_than_their_price_is_not_called_for_ever() -> None:
    """A page's price that was measured too high left a call next to no time, and a round had 200,000 of them."""
    calls = []

    def touching() -> None:
        calls.append(torch.empty(2**22, dtype=torch.uint8).fill_(1)[0])  # 4 MiB of new memory
        end = now_ns() + 300_000
        while now_ns() < end:
            pass

    assert Clock(1_000_000, page_ns=10**9).ns(touching) >= 300_000 // 10 // 2
    assert len(calls) < 50


def test_after_its_time_a_clock_times_each_call_once() -> None:
    calls: list[int] = []
    clock = Clock(1_000_000_000, hurry_at_ns=0)
    assert clock.ns(lambda: calls.append(1)) > 0
    assert (len(calls), clock.hurried) == (2, 1)


def test_measuring_says_at_once_what_it_measures_and_then_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "parts", lambda dtype: {"sums": iter(SMALL), "products": iter(SMALL)})
    monkeypatch.setattr(device, "_page_ns", lambda: 0)
    monkeypatch.setattr(device, "_copy_rate", lambda clock: 10**9)
    said: list[str] = []
    found = measure_device("cpu", said.append)
    assert "measuring this CPU" in said[0]
    assert found.name in said[0]
    assert said[-2:] == ["sums", "products"]
    if not torch.cuda.is_available():
        said.clear()
        assert measure_device("auto", said.append).id == "cpu"
        assert "there is no CUDA device" in said[0]


@pytest.mark.slow
def test_what_is_measured_covers_every_op_that_stands_for_a_class() -> None:
    from vdnn.costs.measured import _LIKE

    assert set(_LIKE.values()) <= {case.op for case in cases(torch.float32)}


def test_a_device_that_is_not_there_cannot_be_measured() -> None:
    with pytest.raises(UsageError, match="did you mean"):
        measure_device("cdua")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            measure_device("cuda")


@pytest.mark.slow
def test_a_cpu_is_measured_in_under_a_minute_and_every_number_has_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "BUDGET_NS", 0)
    torch.set_num_threads(1)
    began = now_ns()
    found = measure_device("cpu")
    assert now_ns() - began < 60e9
    found.check()
    said = {source.field for source in found.sources}
    assert {"peaks", "dram_bytes_per_s", "timings", "page_ns", "launch_ns"} <= said
    assert found.peak("float32") > 10**8
