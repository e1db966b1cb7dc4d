"""Models of transformers with random weights, from a table of configurations: nothing is downloaded.

    hf:gpt2 hf:gpt2-medium hf:gpt2-large hf:gpt2-xl         causal language models, sequence 1024
    hf:bert-base hf:bert-large                              masked language models, sequence 512
    hf:llama-1b hf:llama-3b hf:llama-8b                     Llama 3's shapes, sequence 2048
    hf:t5-small hf:t5-base                                  encoder and decoder, sequence 512 and a quarter of it
    hf:vit-base hf:vit-large                                image classifiers, 224 × 224
    hf:mamba-130m                                           state-space model, sequence 128 (see below)
    hf:mixtral-small                                        Mixtral's shape at 0.7 billion weights, sequence 1024

Labels are among the inputs, so the loss is the model's own. `layers=`, `hidden=` and `vocabulary=` shrink a
model; head size and the ratio of the inner width stay. Attention is "sdpa" unless `attention=eager`.

Mamba runs transformers' sequential loop over the tokens, as it does wherever `mamba_ssm` is not installed:
some five ops a token and layer, hence the short default sequence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vdnn.errors import unknown_name
from vdnn.models import experts
from vdnn.models.fakes import on_fakes
from vdnn.models.options import Option, choice, identity, read, whole
from vdnn.models.vision import CLASSES, missing
from vdnn.models.work import Device, Work, built, classes, images, own_loss, tokens

__all__ = ["hf_names", "hf_work"]

Task = Literal["causal", "masked", "seq2seq", "image"]

_SIZES = {
    "layers": Option(whole, "number of layers (of encoder and decoder each)"),
    "hidden": Option(whole, "features of a token; the number of heads and the inner width follow"),
}
_TEXT = {
    **_SIZES,
    "sequence": Option(whole, "tokens in a sequence"),
    "vocabulary": Option(lambda name, value: whole(name, value, 8), "number of different tokens"),
}
_ATTENTION = {"attention": Option(choice("sdpa", "eager"), "sdpa (the default) or eager")}


@dataclass(frozen=True, slots=True)
class Size:
    """The numbers that make a model of its family."""

    layers: int
    hidden: int
    heads: int = 1
    kv_heads: int = 1
    inner: int = 0
    vocabulary: int = 0
    sequence: int = 0

    def with_hidden(self, hidden: int) -> Size:
        """The same model with another width: as many heads of the same size as fit."""
        heads = max(1, hidden * self.heads // self.hidden)
        kv_heads = max(1, heads * self.kv_heads // self.heads)
        while heads % kv_heads:
            kv_heads -= 1
        inner = max(1, self.inner * hidden // self.hidden)
        return dataclasses.replace(self, hidden=hidden, heads=heads, kv_heads=kv_heads, inner=inner)


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture: its classes in transformers, and how its configuration calls the numbers of a `Size`."""

    config: str
    model: str
    task: Task
    settings: Callable[[Size], dict[str, Any]]
    options: Mapping[str, Option]


# -- families ------------------------------------------------------------------------------------


def _gpt2(size: Size) -> dict[str, Any]:
    return {
        "n_layer": size.layers,
        "n_embd": size.hidden,
        "n_head": size.heads,
        "vocab_size": size.vocabulary,
        "n_positions": max(1024, size.sequence),
        "bos_token_id": size.vocabulary - 1,
        "eos_token_id": size.vocabulary - 1,
    }


def _encoder(size: Size) -> dict[str, Any]:
    return {
        "num_hidden_layers": size.layers,
        "hidden_size": size.hidden,
        "num_attention_heads": size.heads,
        "intermediate_size": size.inner,
    }


def _bert(size: Size) -> dict[str, Any]:
    positions = max(512, size.sequence)
    return {**_encoder(size), "vocab_size": size.vocabulary, "max_position_embeddings": positions}


def _vit(size: Size) -> dict[str, Any]:
    # `sequence` is the image size here
    labels = {"num_labels": CLASSES, "problem_type": "single_label_classification"}
    return {**_encoder(size), "image_size": size.sequence, **labels}


def _decoder(size: Size) -> dict[str, Any]:
    return {
        **_encoder(size),
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.hidden // size.heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": max(8192, size.sequence),
    }


def _llama(size: Size) -> dict[str, Any]:
    # Llama 3.2's 1B and 3B share the embedding with the output layer, 8B does not
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    return {**_decoder(size), "rope_parameters": rope, "tie_word_embeddings": size.hidden < 4096}


def _mixtral(size: Size) -> dict[str, Any]:
    routing = {"num_local_experts": 8, "num_experts_per_tok": 2, "experts_implementation": experts.register()}
    return {**_decoder(size), **routing}


def _t5(size: Size) -> dict[str, Any]:
    return {
        "num_layers": size.layers,
        "num_decoder_layers": size.layers,
        "d_model": size.hidden,
        "d_kv": size.hidden // size.heads,
        "num_heads": size.heads,
        "d_ff": size.inner,
        "vocab_size": size.vocabulary,
        "decoder_start_token_id": 0,
    }


def _mamba(size: Size) -> dict[str, Any]:
    return {"num_hidden_layers": size.layers, "hidden_size": size.hidden, "vocab_size": size.vocabulary}


_IMAGE = {**_SIZES, **_ATTENTION, "image_size": Option(lambda n, v: whole(n, v, 16), "a multiple of 16 pixels")}
GPT2 = Family("GPT2Config", "GPT2LMHeadModel", "causal", _gpt2, _TEXT | _ATTENTION)
BERT = Family("BertConfig", "BertForMaskedLM", "masked", _bert, _TEXT | _ATTENTION)
LLAMA = Family("LlamaConfig", "LlamaForCausalLM", "causal", _llama, _TEXT | _ATTENTION)
T5 = Family("T5Config", "T5ForConditionalGeneration", "seq2seq", _t5, _TEXT | _ATTENTION)
VIT = Family("ViTConfig", "ViTForImageClassification", "image", _vit, _IMAGE)
MAMBA = Family("MambaConfig", "MambaForCausalLM", "causal", _mamba, _TEXT)
MIXTRAL = Family("MixtralConfig", "MixtralForCausalLM", "causal", _mixtral, _TEXT | _ATTENTION)

MODELS: dict[str, tuple[Family, Size]] = {
    "gpt2": (GPT2, Size(12, 768, 12, vocabulary=50257, sequence=1024)),
    "gpt2-medium": (GPT2, Size(24, 1024, 16, vocabulary=50257, sequence=1024)),
    "gpt2-large": (GPT2, Size(36, 1280, 20, vocabulary=50257, sequence=1024)),
    "gpt2-xl": (GPT2, Size(48, 1600, 25, vocabulary=50257, sequence=1024)),
    "bert-base": (BERT, Size(12, 768, 12, inner=3072, vocabulary=30522, sequence=512)),
    "bert-large": (BERT, Size(24, 1024, 16, inner=4096, vocabulary=30522, sequence=512)),
    "llama-1b": (LLAMA, Size(16, 2048, 32, 8, 8192, 128256, 2048)),
    "llama-3b": (LLAMA, Size(28, 3072, 24, 8, 8192, 128256, 2048)),
    "llama-8b": (LLAMA, Size(32, 4096, 32, 8, 14336, 128256, 2048)),
    "t5-small": (T5, Size(6, 512, 8, inner=2048, vocabulary=32128, sequence=512)),
    "t5-base": (T5, Size(12, 768, 12, inner=3072, vocabulary=32128, sequence=512)),
    "vit-base": (VIT, Size(12, 768, 12, inner=3072, sequence=224)),
    "vit-large": (VIT, Size(24, 1024, 16, inner=4096, sequence=224)),
    "mamba-130m": (MAMBA, Size(24, 768, vocabulary=50280, sequence=128)),
    "mixtral-small": (MIXTRAL, Size(8, 1024, 16, 4, 3584, 32000, 1024)),
}


# -- works ---------------------------------------------------------------------------------------


def hf_names() -> tuple[str, ...]:
    """Names in the table of configurations."""
    return tuple(MODELS)


def hf_work(model: str, batch: int, given: Mapping[str, object]) -> Work:
    """`hf:NAME`.

    Raises:
        UsageError: not in the table, an option that the model does not have, or transformers is missing.
    """
    if model not in MODELS:
        raise unknown_name("hf model", model, MODELS, "only these configurations come with vdnn")
    try:
        import transformers
    except ImportError:
        raise missing("transformers") from None
    name = f"hf:{model}"
    family, size = MODELS[model]
    values = read(name, given, family.options)
    # the width of Llama decides about tied embeddings, so that is settled before it changes
    tied = {key: value for key, value in family.settings(size).items() if key == "tie_word_embeddings"}
    if "hidden" in values:
        size = size.with_hidden(values["hidden"])
    size = dataclasses.replace(
        size,
        layers=values.get("layers", size.layers),
        vocabulary=values.get("vocabulary", size.vocabulary),
        sequence=values.get("sequence", values.get("image_size", size.sequence)),
    )

    def make() -> nn.Module:
        settings = family.settings(size) | tied
        if "attention" in family.options:
            settings["attn_implementation"] = values.get("attention", "sdpa")
        with _quiet(), _weights_left_alone_on_fakes():
            config = getattr(transformers, family.config)(**settings, use_cache=False)
            made = getattr(transformers, family.model)(config)
        made.tie_weights()  # transformers skips this together with the initialisers
        if getattr(made, "loss_type", None) is None:  # GPT-2's class name does not tell; same loss, no warning
            made.loss_type = "ForCausalLM"
        assert isinstance(made, nn.Module)
        return made

    return Work(
        name=name,
        batch=batch,
        options=identity(values),
        build=built(name, identity(values), make),
        inputs=lambda device: ((), _inputs(family.task, size, batch, device)),
        targets=lambda device: None,
        loss=own_loss,
    )


def _inputs(task: Task, size: Size, batch: int, device: Device) -> dict[str, Tensor]:
    if task == "image":
        pixels = images(batch, (3, size.sequence, size.sequence), device)
        return {"pixel_values": pixels, "labels": classes((batch,), CLASSES, device)}
    ids = tokens(batch, size.sequence, size.vocabulary, device)
    if task == "causal":
        return {"input_ids": ids, "labels": ids.clone()}  # the model shifts them itself
    if task == "seq2seq":
        return {"input_ids": ids, "labels": classes((batch, max(1, size.sequence // 4)), size.vocabulary, device)}
    labels = torch.full_like(ids, -100)  # -100 means: not asked for
    labels[:, ::7] = ids[:, ::7]  # every seventh, about BERT's 15 %
    return {"input_ids": ids, "labels": labels}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers prints configurations and advice for text generation while it builds a model."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(40)  # errors only, as in Python's own logging
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _weights_left_alone_on_fakes() -> contextlib.AbstractContextManager[None]:
    """transformers keeps its own copies of torch's initialisers, and its own way to skip them."""
    if not on_fakes():
        return contextlib.nullcontext()
    try:
        place = importlib.import_module("transformers.initialization")
    except ImportError:  # transformers 4
        place = importlib.import_module("transformers.modeling_utils")
    skipped: contextlib.AbstractContextManager[None] = place.no_init_weights()
    return skipped
