"""Time and memory of a training step under every method, ours beside its prediction and beside the peers'."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import vdnn
from experiments.gpu.methods import METHODS, OURS, Around, NotHere, moved
from experiments.gpu.parts import link
from experiments.gpu.session import Session
from experiments.gpu.workloads import Setup, Workload
from vdnn.errors import VdnnError
from vdnn.policies import model_options

WARM, TIMED = 3, 5


def measure(session: Session) -> list[dict[str, Any]]:
    """Every method on every network; then, as far as there is time, what was predicted, which takes no GPU."""
    if not session.link and not session.virtual:
        link.measure(session)  # what predictions and bounds stand on
    rows: list[dict[str, Any]] = []
    broken = ""
    for workload in session.workloads:
        plain: dict[str, Any] | None = None
        for method in METHODS:
            row: dict[str, Any] = {"model": str(workload), "options": workload.options, "method": method}
            rows.append(row)
            if broken or session.over():
                row["not_run"] = broken or "the time was up"
                continue
            try:
                row["measured"] = measured(session, workload, method)
            except NotHere as error:
                row["not_run"] = str(error)
            except torch.OutOfMemoryError as error:
                row["out_of_memory"] = str(error).split(". ")[0]
            except Exception as error:  # a peer may fail in its own way
                row["failed"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            try:
                _clear()
            except RuntimeError as error:  # an error that CUDA does not recover from
                broken = f"the device failed in {method}: {str(error).splitlines()[0]}"
            if method == "no offload":
                plain = row.get("measured")
            elif plain and "measured" in row and not session.virtual:
                row["measured"]["slowdown"] = round(row["measured"]["step_s"] / plain["step_s"], 4)
                if method in OURS and session.link:
                    row["measured"]["over_ideal"] = over_ideal(session, plain, row["measured"])
            session.keep(rows)
    for workload in session.workloads:
        for row in rows:
            if row["model"] == str(workload) and row["method"] in ("no offload", *OURS) and not session.over():
                policy = "none" if row["method"] == "no offload" else row["method"]
                row["predicted"] = predicted(session, workload, policy)
                session.keep(rows)
    return rows


def predicted(session: Session, workload: Workload, policy: str) -> dict[str, Any]:
    """What `vdnn simulate` says of this GPU, with the link that was measured."""
    try:
        work = workload.load(**model_options(policy))
        trace = vdnn.capture(work, precision=workload.precision, optimizer="sgd", device=session.device.type)
        machine = session.hardware()
        result = vdnn.simulate(trace, vdnn.plan(trace, machine, policy), machine)
    except VdnnError as error:
        return {"refused": str(error)}
    return {
        "peak_requested_bytes": result.peak_requested_bytes,
        "peak_allocated_bytes": result.peak_allocated_bytes,
        "peak_reserved_bytes": result.peak_reserved_bytes,
        "iteration_time_ns": result.iteration_time_ns,
        "stall_ns": result.stall_ns,
        "offloaded_bytes": result.offloaded_bytes,
    }


def measured(session: Session, workload: Workload, method: str) -> dict[str, Any]:
    setup = Setup(workload, session.device)
    with METHODS[method](setup) as around:
        for _ in range(1 if session.virtual else WARM):
            setup.step(around)
        session.synchronize()
        if session.virtual:
            found: dict[str, Any] = {}
        else:
            found = _timed(setup, around)
            if method in OURS:
                try:
                    found.update(_overlap(lambda: setup.step(around)))
                except Exception as error:  # the profiler needs rights that a container may not give
                    found["overlap_failed"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
        if method in OURS:
            report = vdnn.report(setup.model)
            found |= moved(setup)
            found |= {
                "policy": report.policy,
                "host_peak_bytes": report.host_peak_bytes,
                "host_reserved_bytes": report.host_reserved_bytes,
                "mismatches": list(report.mismatches[:3]),
            }
    return found


def _timed(setup: Setup, around: Around) -> dict[str, Any]:
    """Medians of five steps, each waited for; forward and backward between events on the compute stream."""
    _clear()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_peak_host_memory_stats()
    steps, forwards, backwards = [], [], []
    for _ in range(TIMED):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        begin = time.perf_counter()
        events[0].record()
        loss = setup.forward(around)
        events[1].record()
        loss.backward()
        events[2].record()
        del loss
        setup.finish()
        torch.cuda.synchronize()
        steps.append(time.perf_counter() - begin)
        forwards.append(events[0].elapsed_time(events[1]) / 1e3)
        backwards.append(events[1].elapsed_time(events[2]) / 1e3)
    stats, host = torch.cuda.memory_stats(), torch.cuda.host_memory_stats()
    return {
        "step_s": statistics.median(steps),
        "forward_s": statistics.median(forwards),
        "backward_s": statistics.median(backwards),
        "peak_requested_bytes": stats.get("requested_bytes.all.peak"),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "torch_pinned_peak_bytes": host.get("allocated_bytes.peak"),
        "alloc_retries": stats.get("num_alloc_retries"),
    }


def over_ideal(session: Session, plain: dict[str, Any], ours: dict[str, Any]) -> float:
    """The step, over one that only waits for the slower of compute and link in forward and in backward."""
    out = ours["offloaded_bytes"] / session.link["d2h_bytes_per_s"]
    back = ours["returned_bytes"] / session.link["h2d_bytes_per_s"]
    rest = plain["step_s"] - plain["forward_s"] - plain["backward_s"]
    ideal = max(plain["forward_s"], out) + max(plain["backward_s"], back) + rest
    return round(ours["step_s"] / ideal, 4)


def _overlap(step: Callable[[], None]) -> dict[str, Any]:
    """From the profiler's spans: time the link was busy, and how much of it while kernels ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    copies, kernels = [], []
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.device_type() != torch.autograd.DeviceType.CUDA:
            continue
        span = (event.start_ns(), event.start_ns() + event.duration_ns())
        name = event.name()
        if "Memcpy DtoH" in name or "Memcpy HtoD" in name:
            copies.append(span)
        elif "Memcpy" not in name and "Memset" not in name:
            kernels.append(span)
    busy = union(copies)
    return {"link_busy_ns": busy, "link_busy_while_computing_ns": busy + union(kernels) - union(copies + kernels)}


def union(spans: list[tuple[int, int]]) -> int:
    """Total length that the spans cover."""
    covered, end = 0, 0
    for start, stop in sorted(spans):
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    return covered


def _clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
