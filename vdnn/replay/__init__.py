"""A recorded PyTorch memory snapshot against the model of the allocator."""

from vdnn.replay.verdict import DeviceReplay, replay_snapshot

__all__ = ["DeviceReplay", "replay_snapshot"]
