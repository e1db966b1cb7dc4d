"""What the GPUs of a node share, and what summing a bucket over them costs.

A ring sends 2·(n − 1)/n of a bucket's bytes from each GPU to the next, and so many come in. Its rate:

    over NVLink     four fifths of what NVLink carries each way (assumed; the rest is protocol)
    without it      over the host link, through host memory, as NCCL does where GPUs cannot reach each other: every byte
                    goes out and comes in at once, so half of what the link carries both ways together

In the second case the ring uses the very link that offload needs: while both run, each has half of its rate. The
ring's steps are taken to cost no latency. All GPUs run the same step in lockstep, so those behind one switch copy at
the same time, and each has its share of the link, never more. The host's DRAM is not taken for a limit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vdnn.values.hardware import Hardware
from vdnn.values.node import Node

__all__ = ["Ring", "ring_of", "share_of"]

_NVLINK_PERMILLE = 800


@dataclass(frozen=True, slots=True)
class Ring:
    """The way over which buckets are summed; `on_link` says that it is the link to the host."""

    gpus: int
    bytes_per_s: int
    on_link: bool

    def sent_bytes(self, nbytes: int) -> int:
        """What each GPU sends for a bucket of that size, rounded up."""
        return -(-2 * (self.gpus - 1) * nbytes // self.gpus)


def share_of(hardware: Hardware, node: Node) -> Hardware:
    """The machine as one of the GPUs has it, while all that share its link use it."""
    if node.gpus_per_link == 1:
        return hardware
    return replace(
        hardware,
        d2h_bytes_per_s=max(1, hardware.d2h_bytes_per_s // node.gpus_per_link),
        h2d_bytes_per_s=max(1, hardware.h2d_bytes_per_s // node.gpus_per_link),
        duplex_bytes_per_s=max(1, hardware.duplex_bytes_per_s // node.gpus_per_link),
    )


def ring_of(hardware: Hardware, node: Node) -> Ring:
    """The ring of a node whose GPUs each have this machine (with their share of the link)."""
    if hardware.nvlink_bytes_per_s:
        return Ring(node.gpus, max(1, hardware.nvlink_bytes_per_s * _NVLINK_PERMILLE // 1000), False)
    return Ring(node.gpus, max(1, hardware.duplex_bytes_per_s // 2), True)
