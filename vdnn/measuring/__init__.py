"""What a real device can do, measured on it, as a `Hardware`: a GPU against its datasheet, a CPU kernel by kernel."""

from vdnn.measuring.device import DEVICES, measure_device

__all__ = ["DEVICES", "measure_device"]
