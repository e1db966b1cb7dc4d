"""What a step costs under a plan, on a model of a machine: streams, the link, stalls, memory."""

from vdnn.sim.simulator import simulate_step

__all__ = ["simulate_step"]
