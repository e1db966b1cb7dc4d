"""The table of cuDNN 4's algorithms gives back the figures that it was read from: 5 (workspace) and 6 (time)."""

from __future__ import annotations

from typing import Any

import pytest

from vdnn.errors import UsageError
from vdnn.values import Op, algorithm_table

TABLE = algorithm_table("cudnn4")


def conv(batch: int, channels: int, filters: int, side: int, phase: Any = "forward", name: str = "convolution") -> Op:
    """A 3 × 3 convolution of VGG; backward as both gradients in one op, unless its name says otherwise."""
    flops = 2 * batch * channels * filters * side**2 * 9 * (2 if name == "convolution" and phase == "backward" else 1)
    dims = (batch, channels, filters, 1, side**2, 9, side**2)
    return Op(name, phase, -1, "conv", "float32", dims, (), (), flops, 0, 0, 0)


# layer: channels, filters, side; workspace in Fig. 5 (MiB, batch 256); forward and backward in Fig. 6 (ms, batch 64)
LAYERS = {
    "C1": ((3, 64, 224), 0, 11.8, 47.8),
    "C2": ((64, 64, 224), 0, 50.5, 129.3),
    "C3": ((64, 128, 112), 0, 23.7, 47.4),
    "C4": ((128, 128, 112), 882, 41.8, 80.6),
    "C5": ((128, 256, 56), 1224, 15.0, 35.6),
    "C6": ((256, 256, 56), 1907, 24.2, 64.0),
    "C9": ((256, 512, 28), 1636, 12.9, 33.0),
    "C10": ((512, 512, 28), 3273, 23.8, 60.8),
    "C13": ((512, 512, 14), 873, 5.4, 13.0),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_workspace_of_the_fastest_algorithm_is_that_of_figure_5(layer: str) -> None:
    shape, workspace_mib, _, _ = LAYERS[layer]
    fastest = TABLE.offers(conv(256, *shape))[0]
    assert fastest.workspace_bytes / 2**20 == pytest.approx(workspace_mib, abs=3)


@pytest.mark.parametrize("layer", LAYERS)
def test_time_of_the_fastest_algorithm_is_that_of_figure_6(layer: str) -> None:
    shape, _, forward_ms, backward_ms = LAYERS[layer]
    for phase, expected in (("forward", forward_ms), ("backward", backward_ms)):
        fastest = TABLE.offers(conv(64, *shape, phase=phase))[0]
        assert fastest.time_ns / 1e6 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("layer", LAYERS)
def test_whoever_wants_less_workspace_takes_more_time_down_to_implicit_gemm_without_any(layer: str) -> None:
    offers = TABLE.offers(conv(64, *LAYERS[layer][0]))
    assert offers[-1].algorithm == "implicit-gemm"
    assert offers[-1].workspace_bytes == 0
    times, workspaces = [o.time_ns for o in offers], [o.workspace_bytes for o in offers]
    assert times == sorted(times)
    assert workspaces == sorted(workspaces, reverse=True)


def test_the_input_s_gradient_is_a_convolution_with_channels_and_filters_exchanged() -> None:
    back = TABLE.offers(conv(64, 512, 256, 28, "backward", "input gradient"))[0]
    assert back.workspace_bytes == TABLE.offers(conv(64, 256, 512, 28))[0].workspace_bytes
    both = TABLE.offers(conv(64, 512, 256, 28, "backward"))[0]
    weights = TABLE.offers(conv(64, 512, 256, 28, "backward", "weight gradient"))[0]
    assert both.workspace_bytes == max(back.workspace_bytes, weights.workspace_bytes)


def test_fft_is_not_for_strides() -> None:
    strided = Op("convolution", "forward", -1, "conv", "float32", (64, 64, 64, 1, 28**2, 9, 56**2), (), (), 1, 0, 0, 0)
    assert {offer.algorithm for offer in TABLE.offers(strided)} == {"precomp-gemm", "implicit-gemm"}


def test_a_faster_gpu_is_faster_in_proportion() -> None:
    op = conv(64, *LAYERS["C2"][0])
    half = TABLE.offers(op, 2 * TABLE.peak_flops_per_s)[0].time_ns
    assert half == pytest.approx(TABLE.offers(op)[0].time_ns / 2, rel=1e-6)


def test_every_number_of_the_table_has_a_source() -> None:
    named = " ".join(name for name, _ in TABLE.sources)
    for word in ("fft workspace", "fft-tiling workspace", "gemm workspace", "rates", "channels", "peak_flops_per_s"):
        assert word in named
    assert "0.469" in dict(TABLE.sources)["implicit_gemm_permille"]


def test_an_unknown_table_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="cudnn4"):
        algorithm_table("cudnn5")
