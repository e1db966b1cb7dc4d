"""Small scenarios on the virtual device, each of them right on the engine as it is."""

from tests.engine.mutation.scenarios import (
    blocks,
    cuda_calls,
    detector,
    encoding,
    hostmemory,
    memory,
    recomputing,
    steps,
    streams,
    threads,
    versions,
)
from tests.engine.mutation.scenarios.base import SCENARIOS, Scenario, Wrong

__all__ = [
    "SCENARIOS",
    "Scenario",
    "Wrong",
    "blocks",
    "cuda_calls",
    "detector",
    "encoding",
    "hostmemory",
    "memory",
    "recomputing",
    "steps",
    "streams",
    "threads",
    "versions",
]
