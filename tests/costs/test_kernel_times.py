"""The cost model's formulas: by hand where they can be, and what must hold on any machine."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdnn.analysis.synthetic import conv_chain
from vdnn.costs import fitted, host_times, op_times
from vdnn.costs.kernel_times import Machine, convolution_ns
from vdnn.costs.numbers import CostNumbers, read_fitted
from vdnn.costs.shapes import ConvShape, Shapes, shapes_of
from vdnn.errors import FormatError
from vdnn.values import Efficiency, Hardware, Op, Peak, Trace, hardware, preset_ids

MACHINE = Hardware(
    id="hand",
    name="by hand",
    memory_bytes=1 << 30,
    peaks=(Peak("float32", 10**12), Peak("float16", 8 * 10**12)),
    dram_bytes_per_s=10**12,
    d2h_bytes_per_s=10**9,
    h2d_bytes_per_s=10**9,
    duplex_bytes_per_s=10**9,
    link_latency_ns=0,
    launch_ns=1000,
    kernel_ns=7,
    efficiencies=(),
    sources=(),
)
# Every fraction one, every overhead nothing: what is left is the datasheet.
IDEAL = CostNumbers(
    **{
        name: 0.0 if name.endswith(("_start", "_half", "_bytes", "_taps", "_others", "per_flop", "unhidden")) else 1.0
        for name in CostNumbers.__slots__
    }
)
USUAL = fitted().numbers


def op(
    kernel: str,
    dims: tuple[int, ...],
    *,
    name: str = "op",
    dtype: str = "float16",
    flops: int = 0,
    nbytes: int = 0,
    written: int = 0,
    phase: str = "forward",
) -> Op:
    return Op(name, phase, -1, kernel, dtype, dims, (), (), flops, nbytes, written, 0)  # type: ignore[arg-type]


def time_of(one: Op, machine: Hardware = MACHINE, numbers: CostNumbers = IDEAL, nhwc: bool = False) -> int:
    trace = replace(conv_chain(), ops=(one,), modules=(), storages=(), saved=(), channels_last=nhwc)
    assert isinstance(trace, Trace)
    (ns,) = op_times(trace, machine, numbers)
    return ns


def test_there_are_at_most_forty_numbers_and_each_is_explained():
    assert len(CostNumbers.__slots__) <= 40
    text = CostNumbers.__doc__ or ""
    for name in CostNumbers.__slots__:
        assert name in text, name


def test_a_product_of_whole_tiles_runs_at_the_peak():
    size = 256 * 4
    flops = 2 * size**3
    assert time_of(op("matmul", (1, size, size, size), flops=flops)) == ceil(flops / 8000)


def test_a_product_is_as_slow_as_its_last_wave_of_tiles():
    """Of 128 × 128 there are 9 tiles on 8 multiprocessors: two waves, of which the second runs one tile."""
    machine = replace(MACHINE, sm_count=8)
    one = op("matmul", (9, 128, 128, 127))  # the sum is too short to be split
    waves = {(128, 128): 2, (64, 64): 5, (128, 64): 3}
    best = min(count * 2 * m * n * 127 / 1000 for (m, n), count in waves.items())
    assert time_of(one, machine) == pytest.approx(best, abs=1)


def test_a_long_sum_of_a_small_result_is_split_over_the_multiprocessors():
    one, four = (replace(MACHINE, sm_count=n) for n in (1, 4))
    gradient = op("matmul", (1, 256, 128, 1 << 20))
    assert time_of(gradient, four) == pytest.approx(time_of(gradient, one), rel=1e-3)  # both use the whole machine
    short = op("matmul", (1, 64, 64, 128))
    assert time_of(short, four) > 1.5 * time_of(short, one)  # which a short sum cannot


def test_products_of_many_matrices_on_the_cores_are_not_split():
    one, four = (replace(MACHINE, sm_count=n) for n in (1, 4))
    many = op("matmul", (2, 64, 32, 1 << 16), dtype="float32")
    assert time_of(many, four) == pytest.approx(2 * time_of(many, one), rel=1e-3)  # two of four multiprocessors work


def test_products_of_many_matrices_take_128_rows_at_least_from_ampere_on():
    ampere = replace(MACHINE, peaks=(*MACHINE.peaks, Peak("bfloat16", 8 * 10**12)))
    few, enough = (op("matmul", (8, m, 128, 4096), dtype="float32") for m in (64, 128))
    assert time_of(few, ampere) == time_of(enough, ampere) == pytest.approx(2 * time_of(few), rel=1e-3)


def test_before_volta_columns_that_a_wave_does_not_reach_over_are_read_for_each_row_of_tiles():
    """One multiprocessor's wave is 256 columns. Of 1024 columns each of 8 rows of tiles reads all, 4 bytes each."""
    numbers = replace(IDEAL, read_again=0.01)
    pascal = replace(MACHINE, sm_count=1, process_nm=16)
    wide = op("matmul", (1, 1024, 1024, 512), dtype="float32")
    assert time_of(wide, pascal, numbers) == pytest.approx(8 * 4 * 1024 * 512 / 10, rel=1e-3)
    assert time_of(wide, replace(pascal, process_nm=12), numbers) == time_of(wide, pascal)
    narrow = op("matmul", (1, 128, 256, 4096), dtype="float32")
    assert time_of(narrow, pascal, numbers) == time_of(narrow, pascal)


def test_a_convolution_on_the_cores_takes_as_long_as_the_tiles_a_multiprocessor_has_at_once():
    """8 tiles of 64 × 32 on 8 multiprocessors, each of which is as slow as if it had three."""
    numbers = replace(IDEAL, conv_others=2.0)
    machine = replace(MACHINE, sm_count=8)
    one = op("conv", (1, 64, 32, 1, 512, 25, 512), dtype="float32")
    assert time_of(one, machine, numbers) == pytest.approx(3 * time_of(one, machine), rel=1e-3)


def test_winograds_algorithm_multiplies_a_quarter_as_much():
    """36 products for 16 results of 9 taps each; here for so many channels that its transforms are hidden."""
    fast = replace(MACHINE, dram_bytes_per_s=10**15)
    folded, plain = (op("conv", (16, 256, 256, 1, 4096, window, 4096), dtype="float32") for window in (9, 1))
    assert time_of(folded, fast) == pytest.approx(36 / 16 * time_of(plain, fast), rel=0.01)


def test_a_stream_takes_its_bytes_over_the_bandwidth():
    assert time_of(op("elementwise", (500, 500, 0), nbytes=3000, written=1000)) == 4


def test_a_transposing_copy_uses_a_part_of_what_it_moves():
    numbers = replace(IDEAL, short_run_bytes=6.0)
    straight = op("copy", (10**6, 10**6, 0), nbytes=10**6, written=10**6)
    crossed = op("copy", (10**6, 1, 0), nbytes=10**6, written=10**6)
    assert time_of(straight, numbers=numbers) == pytest.approx(2000, abs=1)
    assert time_of(crossed, numbers=numbers) == pytest.approx(8000, abs=1)  # two bytes of eight


def test_planes_that_are_interpolated_one_after_the_other_take_a_latency_each():
    """A thread a pixel: a million planes of 14 × 14 pixels take as long as their reads wait, whatever the bandwidth."""
    numbers = replace(IDEAL, dram_latency_ns=300.0)
    few, many = (op("elementwise", (planes * 196, 1, 1, planes), nbytes=10**6) for planes in (10, 10**6))
    assert time_of(few, numbers=numbers) == 3000
    assert time_of(many, numbers=numbers) == 3 * 10**8
    large = op("elementwise", (10 * 3072, 1, 1, 10), nbytes=10**3)  # twice the threads that one multiprocessor has
    assert time_of(large, numbers=numbers) == 2 * 3000
    assert time_of(op("elementwise", (196 * 10**6, 1, 1), nbytes=10**6), numbers=numbers) == 1000


def conv(groups: int = 1, name: str = "aten.convolution.default", channels: int = 256, window: int = 9) -> Op:
    """Sixteen images of 32 × 32 pixels."""
    x = 16 * channels * 1024 * 2
    weights = channels * channels // groups * window * 2
    written = x + weights if "backward" in name else x
    reads = 2 * x + weights if "backward" in name else x + weights
    dims = (16, channels, channels, groups, 1024, window, 1024)
    return op("conv", dims, name=name, nbytes=reads, written=written)


def test_around_tensor_cores_nchw_is_turned_and_nhwc_is_not():
    one = conv()
    nbytes = 2 * 16 * 256 * 1024 * 2 + 256 * 256 * 9 * 2
    slow = replace(MACHINE, dram_bytes_per_s=10**13)
    turned = time_of(one, slow) - time_of(one, slow, nhwc=True)
    assert turned == pytest.approx(2 * nbytes / 1e4, abs=2)


def test_backward_of_a_convolution_is_two_and_without_the_input_s_gradient_one():
    numbers = replace(IDEAL, weight_gradient=1.0)
    forward, both = conv(), conv(name="aten.convolution_backward.default")
    weights = 256 * 256 * 9 * 2
    alone = replace(both, written_bytes=weights)
    assert time_of(both, numbers=numbers) > 1.8 * time_of(forward, numbers=numbers)
    assert time_of(alone, numbers=numbers) < 0.6 * time_of(both, numbers=numbers)


def test_tensors_that_a_model_left_channels_last_are_not_turned_either():
    one = conv()
    assert time_of(replace(one, dims=(*one.dims, 1))) == time_of(one, nhwc=True) < time_of(one)


def depthwise(channels: int, window: int, pixels: int, before: int, dtype: str = "float16") -> Op:
    """Forward, one channel a group; its traffic is left out."""
    return op("conv", (16, channels, channels, channels, pixels, window, before), dtype=dtype)


@pytest.mark.parametrize(
    ("one", "library"),
    [
        (depthwise(256, 9, 1024, 1024), True),
        (depthwise(256, 9, 1024, 1024, "float32"), False),
        (depthwise(256, 25, 1024, 1024), True),
        (depthwise(256, 49, 1024, 1024), False),
        (depthwise(16, 9, 1024, 1024), False),
        (depthwise(256, 9, 36, 36), False),
        (depthwise(128, 9, 1024, 4096), False),
        (depthwise(256, 9, 1024, 4096), True),
        (depthwise(256, 9, 100, 400), False),
        (depthwise(512, 9, 100, 400), True),
    ],
)
def test_a_depthwise_convolution_multiplies_on_the_cores_in_the_library_where_pytorch_asks_it(one, library):
    """Which is as `use_cudnn_depthwise` of ATen has it: half precision, small windows, many channels if strided."""
    numbers = replace(IDEAL, depthwise=0.01, depthwise_library=0.02, depthwise_taps=5.0)
    batch, channels, _, _, pixels, window, _ = one.dims
    steps = window / 0.02 if library else (window + 5) / 0.01
    assert time_of(one, numbers=numbers) == ceil(2 * batch * channels * pixels * steps / 1000)


def test_depthwise_tensors_with_channels_last_are_always_the_librarys():
    numbers = replace(IDEAL, depthwise=0.01, depthwise_library=0.02)
    large = depthwise(256, 49, 1024, 1024)
    assert time_of(large, numbers=numbers) == 2 * time_of(large, numbers=numbers, nhwc=True)


def test_a_depthwise_weight_gradient_leaves_multiprocessors_idle_and_reads_a_stride_apart():
    """16 channels of 3 × 3 are 144 blocks; six fit on a multiprocessor. A stride of 2 doubles one of two reads."""
    numbers = replace(IDEAL, depthwise_weight=0.01)
    full, idle = (replace(MACHINE, sm_count=n) for n in (9, 96))  # 54 and 576 blocks fit

    def weight(before: int) -> Op:
        weights = 16 * 9 * 2
        sizes = (16, 16, 16, 16, 1024, 9, before)
        return op("conv", sizes, name="aten.convolution_backward.default", written=weights)

    assert time_of(weight(1024), idle, numbers) == pytest.approx(4 * time_of(weight(1024), full, numbers), rel=1e-3)
    assert time_of(weight(4096), full, numbers) == pytest.approx(1.5 * time_of(weight(1024), full, numbers), rel=1e-3)


def test_a_bias_of_a_convolution_is_a_pass_of_its_own():
    plain = conv()
    biased = replace(plain, read_bytes=plain.read_bytes + 256 * 2)
    image = 16 * 256 * 1024 * 2
    assert time_of(biased) - time_of(plain) == pytest.approx(2 * image / 1000, abs=2)


def test_the_power_limit_bounds_the_rate_of_the_cores():
    """A flop of 10 pJ at 5 W is 500 flops a nanosecond, half of the peak."""
    numbers = replace(IDEAL, fp32_pj_per_flop=10.0)
    product = op("matmul", (1, 1024, 1024, 1024), dtype="float32")
    limited = replace(MACHINE, power_watts=5, process_nm=12)
    assert time_of(product, limited, numbers) == pytest.approx(2 * time_of(product, MACHINE, numbers), rel=1e-3)


def test_efficiencies_measured_on_a_machine_take_the_place_of_the_fitted_ones():
    measured = replace(MACHINE, efficiencies=(Efficiency("matmul", 500, 1000), Efficiency("copy", 1000, 250)))
    product = op("matmul", (1, 1024, 1024, 1024))
    assert time_of(product, measured) == pytest.approx(2 * time_of(product), rel=1e-3)
    copied = op("copy", (10**6, 10**6, 0), nbytes=10**6, written=10**6)
    assert time_of(copied, measured) == 4 * time_of(copied)


@pytest.mark.parametrize("gpu", preset_ids())
def test_every_preset_times_every_op(gpu):
    trace = conv_chain()
    times = op_times(trace, hardware(gpu))
    assert len(times) == len(trace.ops)
    assert min(times) > 0


KERNELS = ("conv", "matmul", "attention", "norm", "pool", "elementwise", "reduce", "copy", "embedding", "rnn", "other")
SIZES = {"conv": 7, "matmul": 4, "attention": 5}


@st.composite
def any_op(draw: st.DrawFn) -> Op:
    kernel = draw(st.sampled_from(KERNELS))
    dims = tuple(draw(st.lists(st.integers(0, 3000), min_size=SIZES.get(kernel, 1), max_size=SIZES.get(kernel, 4))))
    name = draw(st.sampled_from(["aten.x.default", "aten.x_backward.default", "aten.softmax", "aten.batch_norm"]))
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16", "int64", "bool"]))
    numbers = st.integers(0, 10**12)
    return op(kernel, dims, name=name, dtype=dtype, flops=draw(numbers), nbytes=draw(numbers), written=draw(numbers))


@settings(max_examples=200, deadline=None)
@given(any_op(), st.sampled_from(["t4", "titan-x", "rtx3090", "h100"]))
def test_any_op_takes_a_time_that_a_machine_twice_as_fast_does_not_exceed(one, gpu):
    machine = hardware(gpu)
    twice = replace(
        machine,
        dram_bytes_per_s=2 * machine.dram_bytes_per_s,
        peaks=tuple(Peak(p.dtype, 2 * p.flops_per_s) for p in machine.peaks),
        power_watts=2 * (machine.power_watts or 1),
    )
    slow, fast = time_of(one, machine, USUAL), time_of(one, twice, USUAL)
    assert 0 < fast <= slow + 1


def test_equal_ops_are_priced_once_and_a_view_not_at_all():
    shapes = Shapes()
    ops = (conv(), op("view", ()), conv())
    trace = replace(conv_chain(), ops=ops, modules=(), storages=(), saved=())
    first, none, again = shapes_of(trace, shapes)
    assert first == again
    assert none == ()
    assert len(shapes.convolutions) == 1


def test_the_host_is_quicker_with_views_and_in_backward():
    numbers = replace(IDEAL, host_view=0.25, host_backward=0.5)
    ops = (op("elementwise", (1,)), op("view", ()), op("elementwise", (1,), phase="backward"))
    trace = replace(conv_chain(), ops=ops, modules=(), storages=(), saved=())
    assert host_times(trace, MACHINE, numbers) == [1000, 250, 500]


@pytest.mark.parametrize(("old", "new"), [("stream = ", "stream = -"), ("stream = ", "steam = "), ("[numbers]", "[n]")])
def test_a_damaged_file_of_numbers_is_refused(old, new):
    from importlib import resources

    text = (resources.files("vdnn.costs") / "fitted.toml").read_text()
    read_fitted(text, "whole")
    with pytest.raises(FormatError):
        read_fitted(text.replace(old, new, 1), "damaged")


@pytest.mark.parametrize("gpu", preset_ids())
def test_a_weight_s_gradient_runs_at_half_the_rate_of_the_cores_at_least_where_its_sum_is_long(gpu: str) -> None:
    """VGG's layers, whose gradients have few channels and millions of pixels: kernels split that sum.

    Nobody has measured these in fp32 for the fit, where a formula for another kernel made them five times too long.
    """
    numbers = fitted().numbers
    machine = Machine.of(hardware(gpu), numbers)
    for channels, pixels in ((64, 224**2), (128, 112**2), (256, 56**2), (512, 28**2)):
        sizes = (128, channels, channels, 1, pixels, 9, pixels, False, False)
        (weight,) = convolution_ns([ConvShape("float32", "weight", *sizes)], machine, numbers)
        assert 2 * 128 * channels * channels * pixels * 9 / weight > machine.cores / 2
