"""`OffloadCallback`: offload in Hugging Face's `Trainer`.

    trainer = Trainer(model, args, train_dataset=…, callbacks=[OffloadCallback()])
    trainer.train()

The model is wrapped when training begins and unwrapped when it ends, so saved checkpoints and the model that is
left are as without it. Evaluation saves nothing for backward and is not touched.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

import vdnn
from vdnn.errors import EngineError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from vdnn.engine import EngineReport

__all__ = ["OffloadCallback"]

log = logging.getLogger("vdnn")


class OffloadCallback(TrainerCallback):
    """Offloads while the trainer trains. `report` is what was done, once training has ended.

    Args:
        options: those of `vdnn.wrap`: policy, plan, budget, device, hardware, optimizer, min_bytes, …
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.report: EngineReport | None = None
        self._model: nn.Module | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Wrap the model.

        Raises:
            UsageError: the trainer hands over no model, or an option of `vdnn.wrap` cannot be.
        """
        if model is None:
            raise UsageError("the trainer gave no model to on_train_begin: this callback needs transformers' Trainer")
        self._leave()  # training that was broken off by an exception has not ended
        vdnn.wrap(model, **self.options)
        self._model = model

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Unwrap the model, and keep the report."""
        if self._model is not None:
            self.report = vdnn.report(self._model)
            log.info("%s", self.report)
        self._leave()

    def _leave(self) -> None:
        model, self._model = self._model, None
        if model is not None:
            try:
                vdnn.unwrap(model)
            except EngineError:
                log.debug("vdnn: the model was not wrapped")
