"""`Node`: how many GPUs train one model together in one machine, and what they share."""

from __future__ import annotations

from dataclasses import dataclass

from vdnn.errors import UsageError

__all__ = ["ALONE", "Node"]


@dataclass(frozen=True, slots=True)
class Node:
    """GPUs of one kind that run the same step at the same time, each on its own batch (data parallel, as DDP does).

    `gpus_per_link` of them sit behind one PCIe switch and share its link to the host; what all pin together comes out
    of `host_bytes` (None: not known, so not checked).
    """

    gpus: int = 1
    gpus_per_link: int = 1
    host_bytes: int | None = None

    def check(self) -> None:
        """Name the first thing that is wrong.

        Raises:
            UsageError: no GPUs, more of them on a link than there are, or no host memory.
        """
        if self.gpus < 1:
            raise UsageError(f"a node of {self.gpus} GPUs trains nothing: give 1 or more")
        if not 1 <= self.gpus_per_link <= self.gpus:
            raise UsageError(
                f"{self.gpus_per_link} GPUs on a link, of {self.gpus} in the node: give 1 to {self.gpus}, and the "
                "number of GPUs beside it (--gpus 8 --gpus-per-link 4)"
            )
        if self.host_bytes is not None and self.host_bytes < 1:
            raise UsageError(f"host memory of {self.host_bytes} bytes holds nothing: give more than 0")


ALONE = Node()
