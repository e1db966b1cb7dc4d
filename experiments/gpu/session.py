"""What the parts share: the device, the time that is left, the link once it is measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.gpu.workloads import SMALL, WORKLOADS, Workload
from vdnn.errors import UsageError
from vdnn.measuring.recognition import recognised
from vdnn.values import Hardware, hardware

__all__ = ["ROOT", "Session"]

ROOT = Path(__file__).resolve().parents[2]


class Session:
    """What one call of the script has.

    `keep` is given a part's result as far as it is there, so that it is in its file if the process ends.

    Args:
        folder: where files go.
        seconds: nothing new is started after them.
        only: names of the workloads to run.
    """

    def __init__(self, virtual: bool, folder: Path, seconds: float, only: Sequence[str] = ()) -> None:
        self.virtual = virtual
        self.device = torch.device("cpu" if virtual else "cuda")
        self.folder = folder
        self.link: dict[str, int] = {}
        self.keep: Callable[[Any], None] = lambda result: None
        given = SMALL if virtual else WORKLOADS
        self.workloads: tuple[Workload, ...] = tuple(
            w for w in given if not only or any(part in w.name for part in only)
        )
        self._end = time.perf_counter() + seconds

    def left_s(self) -> float:
        return self._end - time.perf_counter()

    def over(self) -> bool:
        return self.left_s() < 0

    def hardware(self) -> Hardware:
        """The preset of this GPU, with its link as it was measured; the H200's where no GPU is."""
        machine = hardware("h200")
        if not self.virtual:
            name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties().total_memory
            found = recognised(name, memory)
            if found is None:
                raise UsageError(f"no preset for {name}: predictions need one (vdnn/values/presets)")
            machine = found
        return dataclasses.replace(machine, **self.link)

    def synchronize(self) -> None:
        if not self.virtual:
            torch.cuda.synchronize()
