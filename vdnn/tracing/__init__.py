"""Capture: the training step that a GPU would run, without a GPU."""

from vdnn.tracing.losses import likely_loss
from vdnn.tracing.step import OPTIMIZERS, PRECISIONS, capture_model, capture_work

__all__ = ["OPTIMIZERS", "PRECISIONS", "capture_model", "capture_work", "likely_loss"]
