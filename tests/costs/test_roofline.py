"""The roofline, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vdnn.costs import DEFAULTS, op_times
from vdnn.synthetic import conv_chain
from vdnn.values import Efficiency, Hardware, Op, Peak, Trace, hardware, preset_ids

MACHINE = Hardware(
    id="hand",
    name="by hand",
    memory_bytes=1 << 30,
    peaks=(Peak("float32", 10**12), Peak("float16", 8 * 10**12), Peak("tf32", 4 * 10**12)),
    dram_bytes_per_s=10**12,
    d2h_bytes_per_s=10**9,
    h2d_bytes_per_s=10**9,
    duplex_bytes_per_s=10**9,
    link_latency_ns=0,
    launch_ns=0,
    kernel_ns=7,
    efficiencies=(Efficiency("conv", 500, 500), Efficiency("matmul", 1000, 1000), Efficiency("norm", 100, 250)),
    sources=(),
)


def time_of(kernel: str, dtype: str, flops: int, nbytes: int, machine: Hardware = MACHINE) -> int:
    op = Op("op", "forward", -1, kernel, dtype, (), (), (), flops, nbytes, 0, 0)  # type: ignore[arg-type]
    trace = replace(conv_chain(), ops=(op,), modules=(), storages=(), saved=())
    assert isinstance(trace, Trace)
    (ns,) = op_times(trace, machine)
    return ns


@pytest.mark.parametrize(
    ("kernel", "dtype", "flops", "nbytes", "ns"),
    [
        ("conv", "float16", 4_000_000, 0, 1000),  # 4e6 / (8e12 · 0.5) s
        ("conv", "float32", 4_000_000, 0, 2000),  # cuDNN takes TF32: 4e6 / (4e12 · 0.5) s
        ("matmul", "float32", 4_000_000, 0, 4000),  # torch does not: 4e6 / 1e12 s
        ("norm", "float16", 1000, 1_000_000, 4000),  # memory: 1e6 / (1e12 · 0.25) s
        ("norm", "float16", 1_000_000, 1000, 10_000),  # no tensor cores: 1e6 / (1e12 · 0.1) s
        ("matmul", "float32", 1, 1, 7),  # no kernel is shorter than kernel_ns
        ("view", "float32", 10**9, 10**9, 0),
        ("matmul", "int8", 1_000_000, 0, 1000),  # an unknown dtype runs at float32's rate
        ("matmul", "float32", 10_001, 0, 11),  # 10.001 ns, rounded up
    ],
)
def test_an_op_takes_the_longest_of_arithmetic_traffic_and_launch(kernel, dtype, flops, nbytes, ns):
    assert time_of(kernel, dtype, flops, nbytes) == ns


def test_without_measured_efficiencies_the_documented_assumptions_apply():
    bare = replace(MACHINE, efficiencies=())
    assert DEFAULTS["matmul"] == (700, 750)
    assert time_of("matmul", "float32", 7_000_000, 0, bare) == 10_000


@pytest.mark.parametrize("gpu", preset_ids())
def test_every_preset_times_every_op(gpu):
    trace = conv_chain()
    times = op_times(trace, hardware(gpu))
    assert len(times) == len(trace.ops)
    assert min(times) > 0
