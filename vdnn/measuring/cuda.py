"""A GPU and its link: pinned copies, device copies, products and convolutions by dtype, and what a kernel costs.

Rates of a GPU that vdnn knows stay those of its datasheet, because the cost model's fractions are of those; what was
measured stands beside them in the sources. For another GPU what was measured is the rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from vdnn.measuring.recognition import recognised
from vdnn.values import Hardware, Peak, Source

__all__ = ["measure_cuda"]

ROUNDS = 5
LINK_BYTES = 2**28
DRAM_BYTES = 2**30
PRODUCT = 8192  # rows and columns
CONVOLUTION = (64, 256, 56)  # images, channels, pixels a side
BUSY_CYCLES = 200_000_000  # 0.1 s, in which the host gets ahead
DTYPES = ("float32", "tf32", "float16", "bfloat16")


def measure_cuda(index: int = 0, tell: Callable[[str], None] = lambda what: None) -> Hardware:
    """Measure CUDA device `index`; nothing else should run on it meanwhile. `tell` hears of each part as it begins."""
    with torch.cuda.device(index), torch.no_grad():
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory
        name = torch.cuda.get_device_name(index)
        tell(f"measuring CUDA device {index}: {name}; it takes under a minute if nothing else runs")
        tell("pinned copies over the link")
        d2h, h2d, both = _link()
        tell("small copies, launches and the memory of the device")
        latency, launch, kernel = _small_copy_ns(), _launch_ns(), _kernel_ns()
        dram = _dram()
        tell("products of matrices")
        products = {dtype: rate for dtype in DTYPES if (rate := _product(dtype))}
        tell("convolutions")
        convolutions = {dtype: rate for dtype in DTYPES if (rate := _convolution(dtype))}
    how = f"measured on {name}, torch {torch.__version__}"
    rates = f"measured TFLOP/s: product of {PRODUCT} {_said(products)}; "
    rates += f"convolution 3×3, {CONVOLUTION[1]} channels {_said(convolutions)}"
    known = recognised(name, memory)
    if known is None:
        known = Hardware(
            id=f"{name.lower().replace(' ', '-')}",
            name=name,
            memory_bytes=memory,
            peaks=tuple(Peak(dtype, rate) for dtype, rate in products.items()),
            dram_bytes_per_s=dram,
            d2h_bytes_per_s=d2h,
            h2d_bytes_per_s=h2d,
            duplex_bytes_per_s=both,
            link_latency_ns=latency,
            launch_ns=launch,
            kernel_ns=kernel,
            efficiencies=(),
            sources=(Source("peaks", rates), Source("dram_bytes_per_s", f"copy of 1 GiB on the device, {how}")),
            sm_count=properties.multi_processor_count,
            l2_bytes=properties.L2_cache_size,
        )
    else:
        said = {s.field: s.text for s in known.sources}
        said["peaks"] = f"{said.get('peaks', '')}; {rates}"
        said["dram_bytes_per_s"] = (
            f"{said.get('dram_bytes_per_s', '')}; a copy on the device {dram / 1e9:.0f} GB/s, {how}"
        )
        known = replace(known, sources=tuple(Source(field, text) for field, text in said.items()))
    said = {s.field: s.text for s in known.sources} | {
        "memory_bytes": f"as the driver says, {how}",
        "d2h_bytes_per_s": f"pinned copies of 256 MiB, best of {ROUNDS}, {how}",
        "h2d_bytes_per_s": f"pinned copies of 256 MiB, best of {ROUNDS}, {how}",
        "duplex_bytes_per_s": f"both ways at once on two streams, the sum, best of {ROUNDS}, {how}",
        "link_latency_ns": f"a pinned copy of 4 bytes, one after the other on one stream, {how}",
        "launch_ns": f"host time of one in-place sum while the device is busy, {how}",
        "kernel_ns": f"device time of one in-place sum of one element, issued beforehand, {how}",
    }
    return replace(
        known,
        memory_bytes=memory,
        d2h_bytes_per_s=d2h,
        h2d_bytes_per_s=h2d,
        duplex_bytes_per_s=max(both, d2h, h2d),
        link_latency_ns=latency,
        launch_ns=launch,
        kernel_ns=kernel,
        sources=tuple(Source(field, text) for field, text in said.items()),
    )


def _said(rates: dict[str, int]) -> str:
    return ", ".join(f"{dtype} {rate / 1e12:.1f}" for dtype, rate in rates.items())


def _seconds(call: Callable[[], object]) -> float:
    """The best of some rounds, from issue to end."""
    call()
    found = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)


def _link() -> tuple[int, int, int]:
    host = [torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    card = [torch.empty(LINK_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def copies(out: bool, back: bool) -> None:
        if out:
            with torch.cuda.stream(streams[0]):
                host[0].copy_(card[0], non_blocking=True)
        if back:
            with torch.cuda.stream(streams[1]):
                card[1].copy_(host[1], non_blocking=True)

    d2h, h2d, both = (_seconds(lambda o=o, b=b: copies(o, b)) for o, b in ((True, False), (False, True), (True, True)))  # type: ignore[misc]
    return round(LINK_BYTES / d2h), round(LINK_BYTES / h2d), round(2 * LINK_BYTES / both)


def _dram() -> int:
    source = torch.empty(DRAM_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return round(2 * source.nbytes / _seconds(lambda: target.copy_(source)))


def _on_device_ns(call: Callable[[], object], count: int) -> int:
    """Device time of one of `count` calls that were issued while the device was busy with something else."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call()
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return max(1, round(float(begin.elapsed_time(end)) * 1e6 / count))


def _small_copy_ns() -> int:
    host, card = torch.empty(1, pin_memory=True), torch.empty(1, device="cuda")
    return _on_device_ns(lambda: card.copy_(host, non_blocking=True), 200)


def _kernel_ns() -> int:
    x = torch.zeros(1, device="cuda")
    return _on_device_ns(lambda: x.add_(1), 500)


def _launch_ns() -> int:
    x = torch.zeros(1, device="cuda")
    x.add_(1)
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    start = time.perf_counter_ns()
    for _ in range(500):  # fewer than the driver's queue holds
        x.add_(1)
    spent = time.perf_counter_ns() - start
    torch.cuda.synchronize()
    return max(1, spent // 500)


def _product(dtype: str) -> int:
    n = PRODUCT

    def run() -> float:
        a = torch.rand(n, n, device="cuda", dtype=getattr(torch, dtype.replace("tf32", "float32")))
        return _seconds(lambda: a @ a)

    return _rate(dtype, run, 2 * n**3)


def _convolution(dtype: str) -> int:
    batch, channels, pixels = CONVOLUTION

    def run() -> float:
        kind = getattr(torch, dtype.replace("tf32", "float32"))
        x = torch.rand(batch, channels, pixels, pixels, device="cuda", dtype=kind)
        w = torch.rand(channels, channels, 3, 3, device="cuda", dtype=kind)
        return _seconds(lambda: F.conv2d(x, w, padding=1))

    return _rate(dtype, run, 2 * batch * channels**2 * pixels**2 * 9)


def _rate(dtype: str, run: Callable[[], float], flops: int) -> int:
    """Flops a second with or without TF32, as the dtype's name asks; 0 where the GPU has none of it."""
    if dtype in ("tf32", "bfloat16") and torch.cuda.get_device_capability()[0] < 8:
        return 0
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        return round(flops / run())
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
