"""Train PyTorch models that do not fit on the GPU, and know beforehand what that will cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdnn.api import capture, load, max_batch, offload, plan, report, run, simulate, track, unwrap, wrap
    from vdnn.engine import CudaDevice, VirtualDevice

__version__ = "0.1.0"

__all__ = [
    "CudaDevice",
    "VirtualDevice",
    "__version__",
    "capture",
    "load",
    "max_batch",
    "offload",
    "plan",
    "report",
    "run",
    "simulate",
    "track",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Public names are looked up when they are used: `import vdnn` loads neither torch nor matplotlib."""
    if name in ("CudaDevice", "VirtualDevice"):
        from vdnn import engine

        return getattr(engine, name)
    if name in __all__:
        from vdnn import api

        return getattr(api, name)
    raise AttributeError(f"module 'vdnn' has no attribute {name!r}")
