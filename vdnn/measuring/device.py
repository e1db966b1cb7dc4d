"""`measure_device`: a CPU as a device of its own, or the GPU that is there."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vdnn.errors import UsageError, unknown_name
from vdnn.measuring.clock import Clock
from vdnn.measuring.kernels import parts
from vdnn.values import Hardware, Peak, Source, Timing

__all__ = ["DEVICES", "measure_device"]

DEVICES = ("auto", "cpu", "cuda")
# glibc's malloc maps blocks above this anew each time (DEFAULT_MMAP_THRESHOLD_MAX on 64-bit machines).
MAPPED = 32 * 2**20
BUDGET_NS = 10_000_000  # a kernel; there are some 500
HURRY_AFTER_NS = 40_000_000_000  # of all kernels, which take half of it on a machine that does nothing else
PAGE = 4096


def measure_device(kind: str = "auto", tell: Callable[[str], None] = lambda what: None) -> Hardware:
    """Measure a device in under a minute; nothing else should run on it meanwhile.

    Args:
        kind: "cuda", "cpu", or "auto": the GPU if there is one, else the CPU.
        tell: is told at once which device it is, then each part as it begins.

    Raises:
        UsageError: an unknown kind, or no such device here.
    """
    if kind not in DEVICES:
        raise unknown_name("device to measure", kind, DEVICES)
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"there is no CUDA device here (torch {torch.__version__}): use --device cpu")
    if kind == "cuda" or (kind == "auto" and torch.cuda.is_available()):
        from vdnn.measuring.cuda import measure_cuda

        return measure_cuda(tell=tell)
    why = " (there is no CUDA device)" if kind == "auto" else ""
    return _measure_cpu(tell, why)


def _measure_cpu(tell: Callable[[str], None], why: str) -> Hardware:
    threads = torch.get_num_threads()
    name = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    tell(f"measuring this CPU{why}: {name}; it takes under a minute if nothing else runs")
    how = f"measured with torch {torch.__version__} on {threads} thread{'s' if threads > 1 else ''}"
    timings: list[Timing] = []
    with torch.no_grad():
        tell("new memory and copies")
        page_ns = _page_ns()
        clock = Clock(BUDGET_NS, page_ns, time.perf_counter_ns() + HURRY_AFTER_NS)
        memory = _copy_rate(clock)
        for part, kernels in parts(torch.float32).items():
            tell(part)
            timings += [Timing(c.op, "float32", c.sizes, clock.ns(c.call)) for c in kernels]
    if clock.hurried:
        tell(f"the machine is busy: {clock.hurried} of {len(timings)} kernels were timed once")
        how += f"; on a busy machine, {clock.hurried} of {len(timings)} kernels once"
    best = max(2 * b * m * n * k / t.ns for t in timings if t.op == "mm" for b, m, n, k in [t.sizes])
    start = min(t.ns for t in timings if t.op == "add")
    said = {
        "memory_bytes": "physical memory, as the system says",
        "peaks": f"the fastest of the products {how}",
        "dram_bytes_per_s": f"copy of 256 MiB, bytes read and written, {how}",
        "d2h_bytes_per_s": "a CPU has no link: a copy within its memory, as above",
        "h2d_bytes_per_s": "a CPU has no link: a copy within its memory, as above",
        "duplex_bytes_per_s": "a CPU has no link: a copy within its memory, as above",
        "link_latency_ns": "a CPU has no link",
        "launch_ns": f"an op starts where it is issued; what it takes to start is in its timing ({start} ns for a sum)",
        "kernel_ns": "as launch_ns",
        "timings": f"each op with a warm and a cold cache, the median of three rounds or more, the mean of both, {how}",
        "page_ns": f"first writes to 256 MiB of new memory, less second ones, {how}",
        "fresh_from_bytes": "glibc: blocks above 32 MiB are mapped anew by malloc and given back by free",
    }
    return Hardware(
        id="cpu",
        name=name,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        peaks=(Peak("float32", round(best * 1e9)),),
        dram_bytes_per_s=2 * memory,
        d2h_bytes_per_s=memory,
        h2d_bytes_per_s=memory,
        duplex_bytes_per_s=memory,
        link_latency_ns=0,
        launch_ns=0,
        kernel_ns=0,
        efficiencies=(),
        sources=tuple(Source(field, text) for field, text in said.items()),
        timings=tuple(timings),
        page_ns=page_ns,
        fresh_from_bytes=MAPPED,
    )


def _page_ns() -> int:
    """What the first write to a page of new memory takes above a later one."""
    from vdnn.measuring.clock import now_ns

    found = []
    for _ in range(3):
        block = torch.empty(2**28, dtype=torch.uint8)
        times = []
        for _ in range(2):
            start = now_ns()
            block.fill_(1)
            times.append(now_ns() - start)
        found.append((times[0] - times[1]) * PAGE // block.numel())
    return max(0, min(found))


def _copy_rate(clock: Clock) -> int:
    source, target = torch.ones(2**26), torch.ones(2**26)
    return round(source.nbytes / clock.ns(lambda: target.copy_(source)) * 1e9)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
