"""The traces of timm's rows: captured once with the options of their software, kept in a folder.

<folder>/train/<model>@<batch>x<image size>.json.gz     torch 1.12: attention in parts, no foreach, SGD with Nesterov
        /infer/<model>@<batch>x<image size>.json.gz     torch 2.4: the forward alone, fused attention
        /failed/…                                       why a row cannot be captured (the model is no longer in timm)
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from unittest import mock

from vdnn import api
from vdnn.errors import FormatError, VdnnError
from vdnn.fidelity.rows import StepRow
from vdnn.fidelity.steps import Shaped
from vdnn.values import Trace, load, save

__all__ = ["Captures"]

# How the rows were measured (docs/costs.md).
OPTIONS: dict[str, dict[str, Any]] = {
    "train": {
        "precision": "amp",
        "optimizer": "sgd-nesterov",
        "attention": "math",
        "zero_grad": "in-place",
        "optimizer_impl": "for-loop",
        "backward_autocast": True,
        "cudnn_benchmark": True,
    },
    "infer": {"precision": "amp", "step": "inference"},
}


@dataclass(frozen=True, slots=True)
class Captures:
    """Traces by row. One trace serves every GPU on which the same step was measured."""

    folder: Path
    allowed: bool = True  # to capture what is missing

    def path(self, row: StepRow) -> Path:
        """Where the row's trace is, or will be."""
        return self.folder / row.kind / f"{row.model}@{row.batch}x{row.image_size}.json.gz"

    def _failed(self, row: StepRow) -> Path:
        return self.folder / "failed" / f"{row.kind}-{row.model}@{row.batch}x{row.image_size}.txt"

    def why_not(self, row: StepRow) -> str | None:
        """Why the row could not be captured; None if it was, or nobody tried."""
        path = self._failed(row)
        return path.read_text().strip() if path.exists() else None

    def read(self, row: StepRow) -> Trace | None:
        """The row's trace, if there is one; a damaged file counts as none."""
        if not self.path(row).exists():
            return None
        try:
            found = load(self.path(row), "trace")
        except FormatError:
            return None
        assert isinstance(found, Trace)
        return found

    def shaped(self, row: StepRow) -> Shaped | None:
        """What the row's cost depends on, from a file of its own once it has been read."""
        path = self.folder / f"shapes-{_digest()}" / row.kind / self.path(row).name
        if path.exists():
            return Shaped.decoded(gzip.decompress(path.read_bytes()).decode())
        trace = self.read(row)
        if trace is None:
            return None
        found = Shaped.of_trace(trace)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(gzip.compress(found.encoded().encode(), 6, mtime=0))
        part.replace(path)
        return found

    def make(self, row: StepRow) -> Trace | None:
        """The row's trace, captured if need be; None if it cannot be, which is noted, or must not be."""
        found = self.read(row)
        if found is not None or not self.allowed or self._failed(row).exists():
            return found
        try:
            work = api.load(f"timm:{row.model}", row.batch, image_size=row.image_size)
            with _resized_as_given() if row.kind == "train" else _fast_norm():
                trace = api.capture(work, **OPTIONS[row.kind])
        except (VdnnError, TypeError, RuntimeError) as error:
            self._failed(row).parent.mkdir(parents=True, exist_ok=True)
            self._failed(row).write_text(f"{error}\n")
            return None
        save(trace, self.path(row))
        return trace

    def make_all(self, rows: Sequence[StepRow], progress: Callable[[str, int, int], None]) -> None:
        """Capture every row that has neither a trace nor a reason why not; breaking off loses nothing."""
        for number, row in enumerate(rows):
            progress(f"capture {row.model} {row.batch}", number, len(rows))
            if not self.path(row).exists():
                self.make(row)


@contextlib.contextmanager
def _resized_as_given() -> Iterator[None]:
    """torch 1.12's autocast resized feature maps in the dtype they came in; torch 2 runs that in fp32."""
    import torch
    from torch.nn import functional

    interpolate = functional.interpolate

    def as_given(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast("cuda", enabled=False):
            return interpolate(*args, **kwargs)

    with mock.patch.object(functional, "interpolate", as_given):
        yield


@contextlib.contextmanager
def _fast_norm() -> Iterator[None]:
    """timm's norms run in the dtype of autocast, as in its benchmark of forwards, instead of in fp32 with casts."""
    layers: Any = importlib.import_module("timm.layers")
    before = layers.is_fast_norm()
    layers.set_fast_norm(True)
    try:
        yield
    finally:
        layers.set_fast_norm(before)


@functools.cache
def _digest() -> str:
    """Of the code that decides what a shape is."""
    source = (resources.files("vdnn.costs") / "shapes.py").read_bytes()
    return hashlib.sha256(source).hexdigest()[:8]
