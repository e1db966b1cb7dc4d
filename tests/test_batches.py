"""The largest batch: it fits, the next does not, and few captures are needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vdnn
from vdnn.batches import largest_batch
from vdnn.errors import CaptureError, InfeasibleError
from vdnn.values import RunResult, Trace


def machine(peak: Callable[[int], int], memory: int) -> tuple[Callable[[int], RunResult], list[int]]:
    asked: list[int] = []

    def simulated(batch: int) -> RunResult:
        asked.append(batch)
        return RunResult(
            "simulated", "m", batch, "g", "none", "fp32", "", "", peak_requested_bytes=peak(batch),
            fits=peak(batch) <= memory,
        )  # fmt: skip

    return simulated, asked


@given(st.integers(0, 10**6), st.integers(1, 10**5), st.integers(1, 10**8), st.integers(0, 3000), st.integers(0, 5000))
def test_the_answer_fits_and_the_next_does_not_wherever_it_starts(
    fixed: int, each: int, memory: int, wobble: int, start: int
) -> None:
    def peak(batch: int) -> int:  # nearly linear: workspaces and rounding wobble, but never downwards
        return fixed + each * batch + min(wobble * (batch // 7), each * batch)

    simulated, asked = machine(peak, memory)
    if peak(1) > memory:
        with pytest.raises(InfeasibleError, match="even with a batch of 1"):
            largest_batch(simulated, memory, limit=4096, start=start)
        return
    best, above = largest_batch(simulated, memory, limit=4096, start=start)
    assert best.fits
    assert len(asked) == len(set(asked)) <= 40
    if above is None:
        assert best.batch == 4096
    else:
        assert above.fits is False
        assert above.batch - best.batch <= max(1, best.batch // 32)


def test_a_linear_model_needs_few_captures() -> None:
    simulated, asked = machine(lambda batch: 1000 + 37 * batch, 24_000)
    best, above = largest_batch(simulated, 24_000)
    assert above is not None
    assert best.batch <= (24_000 - 1000) // 37 < above.batch
    assert len(asked) <= 4
    known, asked = machine(lambda batch: 1000 + 37 * batch, 24_000)
    again, _ = largest_batch(known, 24_000, start=best.batch)
    assert again.batch >= best.batch
    assert len(asked) == 2


def test_offload_makes_room_for_a_larger_batch() -> None:
    found = {}
    for policy in ("none", "vdnn-all"):
        best, above = vdnn.max_batch("demo:cnn", "t4", policy, memory="64MiB", min_bytes=1)
        assert above is not None
        assert best.fits
        assert not above.fits
        found[policy] = best.batch
    assert found["vdnn-all"] > found["none"] > 1


def test_dyn_has_no_smaller_batch_than_the_policies_it_chooses_from() -> None:
    """Whether a plan fits is not monotone in the batch: its search ended at another step than theirs."""
    traces: dict[object, Trace] = {}
    found = {
        name: vdnn.max_batch("demo:cnn", "t4", name, memory="103MiB", traces=traces, min_bytes=1)[0].batch
        for name in ("vdnn-conv", "vdnn-all", "vdnn-dyn")
    }
    assert found["vdnn-dyn"] >= max(found["vdnn-conv"], found["vdnn-all"])


def test_a_batch_too_small_for_the_model_does_not_hide_that_none_fits() -> None:
    """A batch norm of one value cannot be captured: the error was that, and not that the memory is too small."""
    plain, _ = machine(lambda batch: 1000 * batch, 10)

    def simulated(batch: int) -> RunResult:
        if batch < 2:
            raise CaptureError("Expected more than 1 value per channel")
        return plain(batch)

    with pytest.raises(InfeasibleError, match="even with a batch of 2, the smallest that the model runs: its peak is"):
        largest_batch(simulated, 10)

    def broken(batch: int) -> RunResult:
        raise CaptureError("an op asks for values")

    with pytest.raises(CaptureError):
        largest_batch(broken, 10)


@given(st.integers(1, 10**4), st.integers(1, 10**8))
def test_a_batch_without_a_plan_does_not_fit(each: int, memory: int) -> None:
    """`vdnn-dyn` and the planner have no plan for a batch that is too large: that ended the search with an error."""
    simulated, _ = machine(lambda batch: each * batch, memory)

    def planned(batch: int) -> RunResult:
        if each * batch > memory:
            raise InfeasibleError(f"no plan for a batch of {batch}")
        return simulated(batch)

    if each > memory:
        with pytest.raises(InfeasibleError, match=r"no plan for a batch of 1$"):
            largest_batch(planned, memory, limit=4096)
        return
    best, above = largest_batch(planned, memory, limit=4096)
    assert above is None
    most = min(memory // each, 4096)
    assert most - max(1, best.batch // 32) <= best.batch <= most


@pytest.mark.slow
def test_the_planner_fits_no_smaller_batch_than_the_policies_that_it_knows() -> None:
    traces: dict[object, Trace] = {}
    found = {
        name: vdnn.max_batch("demo:cnn", "t4", name, memory="64MiB", traces=traces, min_bytes=1)[0]
        for name in ("none", "vdnn-dyn", "budget")
    }
    assert all(result.fits and result.peak_reserved_bytes <= 64 << 20 for result in found.values())
    assert found["none"].batch <= found["vdnn-dyn"].batch <= found["budget"].batch
    assert found["none"].batch < found["budget"].batch
    assert found["budget"].policy == "budget"
