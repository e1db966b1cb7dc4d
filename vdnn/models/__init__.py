"""Models with a batch of inputs and a loss, by name; nothing is downloaded."""

from vdnn.models.registry import checkpointed, list_models, load
from vdnn.models.work import Work

__all__ = ["Work", "checkpointed", "list_models", "load"]
