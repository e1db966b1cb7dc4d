"""The callback in Hugging Face's own Trainer: the same weights after training, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vdnn
from vdnn.errors import EngineError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from vdnn.integrations.trainer import OffloadCallback  # noqa: E402


class Tokens(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.rows = torch.randint(0, 101, (13, 32), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trained(folder: Path, callbacks: list[Any], **arguments: Any) -> Any:
    config = transformers.GPT2Config(vocab_size=101, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, num_train_epochs=1, use_cpu=True, report_to=[], seed=3,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, **arguments,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=callbacks)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"bf16": True}],
    ids=lambda found: next(iter(found), "plain"),
)
def test_training_gives_the_same_weights(tmp_path: Path, arguments: dict[str, Any]) -> None:
    plain = trained(tmp_path, [], **arguments)
    callback = OffloadCallback(policy="vdnn-all", device=vdnn.VirtualDevice(seed=2), min_bytes=1)
    ours = trained(tmp_path, [callback], **arguments)
    for (name, a), b in zip(plain.model.named_parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert plain.model.state_dict().keys() == ours.model.state_dict().keys()
    report = callback.report
    assert report is not None
    assert report.offloaded_bytes > 0
    assert report.passes == 4  # 13 rows in batches of 4: the last one is of another size
    assert report.host_used_bytes == 0
    with pytest.raises(EngineError, match="not wrapped"):
        vdnn.report(ours.model)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])


def test_training_that_breaks_off_can_begin_again(tmp_path: Path) -> None:
    class Stops(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                raise RuntimeError("stop")

    callback = OffloadCallback(policy="vdnn-all", device=vdnn.VirtualDevice(), min_bytes=1)
    with pytest.raises(RuntimeError, match="stop"):
        trained(tmp_path, [callback, Stops()])
    trained(tmp_path, [callback])
    assert callback.report is not None


def test_on_the_cpu_without_a_virtual_device_nothing_is_wrapped(tmp_path: Path) -> None:
    callback = OffloadCallback()
    trained(tmp_path, [callback])
    assert callback.report is not None
    assert callback.report.passes == 0
    assert "offload is inactive" in str(callback.report)
