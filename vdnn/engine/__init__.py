"""The engine: executes a plan, or a rule, on a device."""

from vdnn.engine.account import Counts, EngineReport
from vdnn.engine.cuda import CudaDevice
from vdnn.engine.cudnn import choose_in_cudnn, what_cudnn_does
from vdnn.engine.device import Device
from vdnn.engine.offloader import Offloader
from vdnn.engine.schedule import Rule, Schedule
from vdnn.engine.virtual import VirtualDevice
from vdnn.engine.wrapping import Engine, engine_of, leave_model, offloading, report_of, unwrap_model, wrap_model

__all__ = [
    "Counts",
    "CudaDevice",
    "Device",
    "Engine",
    "EngineReport",
    "Offloader",
    "Rule",
    "Schedule",
    "VirtualDevice",
    "choose_in_cudnn",
    "engine_of",
    "leave_model",
    "offloading",
    "report_of",
    "unwrap_model",
    "what_cudnn_does",
    "wrap_model",
]
