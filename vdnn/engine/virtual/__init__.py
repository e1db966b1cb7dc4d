"""A device that runs anywhere: ordered, late and accounted for."""

from vdnn.engine.virtual.device import VirtualDevice

__all__ = ["VirtualDevice"]
