"""Published measurements, read from a folder: what ran, on which GPU, how long.

    timm-train-*-<gpu>.csv, timm-infer-*-<gpu>.csv    huggingface/pytorch-image-models, `results/`
    neusight/<kind>.csv                               sitar-lab/NeuSight

The rows stay outside the project; docs/costs.md says where they are from and how they were measured.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vdnn.costs.shapes import ConvShape, ProductShape, StreamShape
from vdnn.errors import FormatError, UsageError

__all__ = ["KERNEL_KINDS", "KernelRow", "StepRow", "family_of", "kernel_rows", "step_rows"]

KERNEL_KINDS = ("conv", "linear", "bmm", "ln", "softmax", "add", "relu", "gelu")
# NeuSight's names of devices → presets.
DEVICES = {
    "NVIDIA A100-PCIE-40GB": "a100-40-pcie",
    "NVIDIA A100 80GB PCIe": "a100-80-pcie",
    "Tesla V100-PCIE-32GB": "v100-pcie",
    "Tesla P100-PCIE-16GB": "p100",
    "Tesla P4": "p4",
    "Tesla T4": "t4",
}
# Prefixes that say where weights are from, not what the model is.
_ORIGINS = ("tf_", "gluon_", "legacy_", "ig_", "ssl_", "swsl_")


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step of a timm model, measured: `kind` "train" (forward, backward, optimizer) or "infer" (forward)."""

    kind: Literal["train", "infer"]
    gpu: str
    model: str
    batch: int
    image_size: int
    measured_ns: int

    @property
    def family(self) -> str:
        """Models of one family are variants of one another: they are fitted together or predicted together."""
        return family_of(self.model)


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One fp32 kernel, measured alone."""

    kind: str
    gpu: str
    shape: ProductShape | ConvShape | StreamShape
    measured_ns: int


def family_of(model: str) -> str:
    """The letters before the first digit or underscore: "resnetv2_50x1" → "resnetv", "vit_base_patch16" → "vit"."""
    name = model
    for origin in _ORIGINS:
        name = name.removeprefix(origin)
    return re.split(r"[_\d]", name)[0]


def step_rows(data: Path) -> list[StepRow]:
    """Every step of the folder's timm files.

    Raises:
        UsageError: there is no such file in the folder.
        FormatError: a file lacks a column, or a number is none.
    """
    found: list[StepRow] = []
    for path in sorted(data.glob("timm-*.csv")):
        match = re.fullmatch(r"timm-(train|infer)-.*-([a-z0-9]+)\.csv", path.name)
        if match is None:
            raise FormatError(f"{path}: the name must say timm-train-… or timm-infer-… and end in -<gpu>.csv")
        kind, gpu = match[1], match[2]
        for line, row in _read(path):
            try:
                found.append(
                    StepRow(
                        kind,  # type: ignore[arg-type]
                        gpu,
                        row["model"],
                        int(row[f"{kind}_batch_size"]),
                        int(row[f"{kind}_img_size"]),
                        round(float(row[f"{kind}_step_time"]) * 1e6),
                    )
                )
            except (KeyError, TypeError, ValueError) as error:
                raise FormatError(f"{path}, line {line}: {_wrong(error)}") from None
    if not found:
        raise UsageError(f"{data} has no timm-*.csv: --data names the folder of the measurements (see docs/costs.md)")
    return found


def kernel_rows(data: Path) -> list[KernelRow]:
    """Every kernel of the folder's NeuSight files; none if it has none of them.

    Raises:
        FormatError: a file lacks a column, a number is none, or the device is unknown.
    """
    found: list[KernelRow] = []
    for kind in KERNEL_KINDS:
        path = data / "neusight" / f"{kind}.csv"
        if not path.exists():
            continue
        for line, row in _read(path):
            try:
                gpu = DEVICES.get(row["device"])
                if gpu is None:
                    raise FormatError(f"{path}, line {line}: unknown device {row['device']!r}")
                found.append(KernelRow(kind, gpu, _shape(kind, row), round(float(row["latency_ms"]) * 1e6)))
            except (KeyError, TypeError, ValueError) as error:
                raise FormatError(f"{path}, line {line}: {_wrong(error)}") from None
    return found


def _read(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with path.open(newline="") as file:
            yield from enumerate(csv.DictReader(file), 2)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"cannot read {path}: {error}") from None


def _wrong(error: Exception) -> str:
    return f"there is no column {error}" if isinstance(error, KeyError) else str(error)


def _shape(kind: str, row: dict[str, str]) -> ProductShape | ConvShape | StreamShape:
    def size(name: str) -> int:
        return int(float(row[name]))

    if kind in ("linear", "bmm"):
        batch, m, n, k = (size(name) for name in ("b", "m", "n", "k"))
        return ProductShape("matmul", "float32", batch, m, n, k, 4 * batch * (m * k + k * n + m * n))
    if kind == "conv":
        names = ("b", "input_channel", "output_channel", "kernel_size", "input_size", "stride", "padding")
        batch, c_in, c_out, window, side, stride, padding = (size(name) for name in names)
        out = (side + 2 * padding - window) // stride + 1
        return ConvShape(
            "float32", "forward", batch, c_in, c_out, 1, out * out, window * window, side * side, False, False
        )
    length = size("h")
    nbytes = 4 * size("b") * length
    if kind in ("ln", "softmax"):
        kernel, stream = ("norm", "layer_norm") if kind == "ln" else ("reduce", "softmax")
        return StreamShape(kernel, stream, nbytes, nbytes, 1 << 30, False, 4 * length)
    return StreamShape("elementwise", "elementwise", (2 if kind == "add" else 1) * nbytes, nbytes, 1 << 30, False, 0)
