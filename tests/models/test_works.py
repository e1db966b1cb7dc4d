"""Works: one step of every kind of model, on a CPU for real and on fake CUDA tensors without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from vdnn.models import Work, load

SMALL_TEXT = {"layers": 2, "hidden": 128, "sequence": 16, "vocabulary": 101}
SMALL_IMAGE = {"layers": 2, "hidden": 128, "image_size": 32}
# name, options that shrink it, whether a real CPU step is quick enough
WORKS: list[tuple[str, dict[str, Any], bool]] = [
    *((f"hf:{name}", SMALL_TEXT, True) for name in ("gpt2", "bert-base", "llama-1b", "t5-small", "mixtral-small")),
    ("hf:gpt2-medium", {**SMALL_TEXT, "attention": "eager"}, True),
    ("hf:llama-8b", {**SMALL_TEXT, "hidden": 256}, True),
    ("hf:mamba-130m", {**SMALL_TEXT, "sequence": 6}, True),
    ("hf:vit-base", SMALL_IMAGE, True),
    ("demo:cnn", {"image_size": 16, "channels": 8}, True),
    ("demo:transformer", {"sequence": 8, "layers": 1, "hidden": 64}, True),
    ("paper:vgg16", {"image_size": 32, "width": 0.1}, True),
    ("paper:vgg116", {"image_size": 32, "width": 0.05}, True),
    ("paper:alexnet", {"image_size": 64, "width": 0.1}, True),
    ("paper:overfeat", {"width": 0.05}, False),
    ("paper:googlenet", {"image_size": 64, "width": 0.1}, True),
    ("torchvision:resnet18", {"image_size": 32}, True),
    ("torchvision:regnet_y_400mf", {"image_size": 32}, True),
    ("torchvision:vit_b_16", {"image_size": 32}, False),
    ("torchvision:googlenet", {}, False),
    ("torchvision:inception_v3", {}, False),
    ("timm:mixnet_s", {"image_size": 32}, True),
    ("timm:vit_tiny_patch16_224", {"image_size": 32}, True),
    ("timm:convnext_atto", {"image_size": 32}, True),
]
NAMES = [name for name, _, _ in WORKS]


def step(work: Work, device: str) -> tuple[torch.nn.Module, torch.Tensor]:
    model = work.build()
    args, kwargs = work.inputs(device)
    return model, work.loss(model(*args, **kwargs), work.targets(device))


@pytest.mark.parametrize(("name", "options", "real"), WORKS, ids=NAMES)
def test_a_step_s_forward_runs_on_fake_cuda_tensors(name: str, options: dict[str, Any], real: bool) -> None:
    work = load(name, batch=2, **options)
    with FakeTensorMode(), torch.device("cuda"):
        model, loss = step(work, "cuda")
    assert model.training
    assert loss.shape == ()
    assert loss.requires_grad
    tensors = [*model.parameters(), *model.buffers()]
    assert all(isinstance(tensor, FakeTensor) for tensor in tensors)
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    if not real:
        return
    # the fake model has the weights of the real one, shared ones shared
    torch.manual_seed(0)
    again, loss = step(work, "cpu")
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in again.named_parameters()]
    assert [(n, b.shape) for n, b in model.named_buffers()] == [(n, b.shape) for n, b in again.named_buffers()]
    # freshly initialised classifiers are about as wrong as guessing; far from it means initialisers were lost
    assert 0 < loss.item() < 10
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in again.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in again.parameters())


def test_inputs_and_targets_are_the_same_numbers_every_time_and_labels_differ_from_inputs() -> None:
    work = load("demo:transformer", batch=3, sequence=8)
    (first,), _ = work.inputs("cpu")
    (second,), _ = work.inputs("cpu")
    assert first.shape == (3, 8)
    assert torch.equal(first, second)
    assert torch.equal(work.targets("cpu"), work.targets("cpu"))
    assert not torch.equal(first, work.targets("cpu"))


def test_a_seed_before_build_gives_the_same_weights() -> None:
    work = load("paper:alexnet", batch=1, image_size=64, width=0.1)
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(work.build())
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_images_and_weights_follow_the_default_dtype() -> None:
    work = load("demo:cnn", batch=1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        (image,), _ = work.inputs("cpu")
        model = work.build()
    finally:
        torch.set_default_dtype(torch.float32)
    assert image.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_building_on_fakes_leaves_torch_s_initialisers_as_they_were() -> None:
    """A library that was first imported while initialisers were off once kept the idle ones for good."""
    before = {name: getattr(torch.nn.init, name) for name in dir(torch.nn.init)}
    with FakeTensorMode(), torch.device("cuda"):
        load("torchvision:resnet18", batch=1).build()
        during = torch.nn.init.zeros_
    assert {name: getattr(torch.nn.init, name) for name in dir(torch.nn.init)} == before
    assert during is before["zeros_"]


def test_auxiliary_classifiers_add_to_the_loss() -> None:
    work = load("torchvision:googlenet", batch=2)
    logits = torch.zeros(2, 1000)
    alone = work.loss(logits, work.targets("cpu"))
    assert work.loss((logits, logits, logits), work.targets("cpu")).item() == pytest.approx(3 * alone.item())


def test_default_image_sizes_are_the_model_s_own() -> None:
    def size(name: str) -> int:
        (image,), _ = load(name, batch=1).inputs("cpu")
        return int(image.shape[-1])

    assert size("torchvision:resnet50") == 224
    assert size("torchvision:inception_v3") == 299
    assert size("torchvision:efficientnet_b3") == 300
    assert size("torchvision:vit_h_14") == 224
    assert size("timm:vit_base_patch16_384") == 384
    assert size("paper:overfeat") == 221


def test_the_experts_give_what_transformers_own_loop_gives() -> None:
    """Every token meets the experts its router chose: outputs and gradients as in the data-dependent loop."""
    work = load("hf:mixtral-small", batch=2, **SMALL_TEXT)
    torch.manual_seed(3)
    model = work.build()
    _, inputs = work.inputs("cpu")
    found = []
    for implementation in (model.config._experts_implementation, "eager"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        found.append((output.logits, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0])
    for ours, loop in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, loop)


def test_shrinking_a_model_keeps_its_head_size_and_its_ratios() -> None:
    model = load("hf:llama-8b", batch=1, layers=1, hidden=1024, vocabulary=100).build()
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 2, 128)
    assert config.intermediate_size == 3584
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-xl", 1_557_611_200),
        ("bert-base", 109_514_298),
        ("llama-1b", 1_235_814_400),
        ("llama-3b", 3_212_749_824),
        ("llama-8b", 8_030_261_248),
        ("t5-base", 222_903_552),
        ("vit-base", 86_567_656),
        ("mamba-130m", 129_135_360),
    ],
)
def test_configurations_have_the_published_numbers_of_weights(name: str, weights: int) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        model = load(f"hf:{name}", batch=1).build()
    assert sum(p.numel() for p in model.parameters()) == weights
