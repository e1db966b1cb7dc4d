"""Device memory that CUDA's libraries take from torch's allocator: it depends on the GPU, so no trace has it.

cuBLAS    one workspace for each thread that multiplies matrices, kept as long as the process: the forward's thread
          and autograd's (aten/src/ATen/cuda/CublasHandlePool.cpp: 8,519,680 bytes, on Hopper 33,554,432)
cuDNN     its tensor-core kernels read and write NHWC: for NCHW tensors input, kernel and output are transposed into
          the workspace first. Depthwise convolutions are torch's own kernels, or need none.

What cuDNN's algorithms take beyond those transposed tensors (Winograd's and FFT's transformed tiles, partial sums of
the weights' gradient) is not modelled, nor that cudnn.benchmark may choose one of them. None of it decides whether a
step fits: where a workspace cannot be had, torch takes the next algorithm (vdnn.sim.allocator_step).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from vdnn.values.hardware import Hardware
from vdnn.values.trace import Op, Storage, Trace

__all__ = ["allocatable_bytes", "held_bytes", "with_libraries", "without_workspaces"]

_FEW = 4  # layers: a patch embedding, and what merges patches between stages
_WIDTH = {"float16": 2, "bfloat16": 2, "float32": 4}


def with_libraries(trace: Trace, hardware: Hardware) -> Trace:
    """The step with the libraries' workspaces on this machine; one of another device than CUDA as it is."""
    if trace.device != "cuda":
        return trace
    ops = trace.ops if trace.channels_last else tuple(_with_workspace(op, hardware) for op in trace.ops)
    n, nbytes = len(ops), hardware.cublas_workspace_bytes
    held = [
        Storage(nbytes, "temporary", f"cuBLAS workspace, {phase}", -1, n, -1, n, "cuBLAS") for phase in _threads(trace)
    ]
    return replace(trace, ops=ops, storages=(*trace.storages, *held))


def allocatable_bytes(trace: Trace, hardware: Hardware) -> int:
    """What torch's allocator can have in this step.

    cuDNN's kernels are loaded onto the device when they are first tried. A network whose convolutions only cut images
    into patches tries few, and has what the others leave to them.
    """
    layers = sum(op.kernel == "conv" and op.phase == "forward" and not _depthwise(op) for op in trace.ops)
    return hardware.available_bytes + (hardware.cudnn_bytes if layers <= _FEW else 0)


def without_workspaces(trace: Trace, ops: Collection[int]) -> Trace:
    """The step as it runs where these ops find no room for their workspaces."""
    if not ops:
        return trace
    chosen = set(ops)
    given = (replace(op, workspace_bytes=0) if i in chosen else op for i, op in enumerate(trace.ops))
    return replace(trace, ops=tuple(given))


def held_bytes(trace: Trace, hardware: Hardware) -> int:
    """What of it is there during the whole step."""
    return len(_threads(trace)) * hardware.cublas_workspace_bytes if trace.device == "cuda" else 0


def _threads(trace: Trace) -> list[str]:
    """The phases that multiply matrices, each on a thread of its own; the optimizer runs on forward's."""
    return sorted({op.phase for op in trace.ops if op.kernel == "matmul" and op.phase != "optimizer"})


def _with_workspace(op: Op, hardware: Hardware) -> Op:
    nbytes = _transposed_bytes(op, hardware) if op.kernel == "conv" else 0
    return replace(op, workspace_bytes=op.workspace_bytes + nbytes) if nbytes else op


def _transposed_bytes(op: Op, hardware: Hardware) -> int:
    """Input, kernel and output of a convolution on tensor cores; in backward the two gradients come one by one."""
    rate = hardware.peak({"float32": "tf32"}.get(op.dtype, op.dtype))
    if op.dtype not in _WIDTH or len(op.dims) < 7 or not _tensor_cores(hardware) or rate <= hardware.peak("float32"):
        return 0
    if _depthwise(op):
        return 0
    batch, c_in, c_out, groups, out_pixels, kernel_pixels, in_pixels = op.dims[:7]
    elements = batch * (c_in * in_pixels + c_out * out_pixels) + c_in // groups * c_out * kernel_pixels
    return elements * _WIDTH[op.dtype]


def _depthwise(op: Op) -> bool:
    return len(op.dims) >= 7 and op.dims[3] > 1 and op.dims[3] == op.dims[1]


def _tensor_cores(hardware: Hardware) -> bool:
    """Whether the card has them: with TF32 from Ampere on, before that by a rate that two halves in a register miss."""
    return any(p.dtype == "tf32" for p in hardware.peaks) or hardware.peak("float16") > 3 * hardware.peak("float32")
