"""Checkpointing of repeated blocks: found by structure, exact to the bit, buffers updated once, undone whole."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import vdnn
from vdnn.checkpointing import blocks_of, checkpoint_blocks
from vdnn.errors import EngineError, UsageError

FAMILIES = {
    "torchvision:resnet18": ("layer1.0", 8),
    "torchvision:densenet121": ("features.denseblock1.denselayer1", 58),
    "torchvision:vit_b_16": ("encoder.layers.encoder_layer_0", 12),
    "torchvision:swin_t": ("features.1.0", 15),
    "hf:gpt2": ("transformer.h.0", 12),
    "hf:bert-base": ("bert.encoder.layer.0", 12),
    "demo:transformer": ("blocks.0", 4),
    "torchvision:vgg16": ("", 0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_repeated_blocks_are_found_by_structure(name: str) -> None:
    first, number = FAMILIES[name]
    with torch.device("meta"):
        model = vdnn.load(name, batch=1).build()
    found = blocks_of(model)
    assert len(found) == number
    assert found[:1] == ([first] if first else [])


def step(model: nn.Module, work) -> list[torch.Tensor]:
    torch.manual_seed(3)
    args, kwargs = work.inputs("cpu")
    loss = work.loss(model(*args, **kwargs), work.targets("cpu"))
    loss.backward()
    found = [loss.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]
    model.zero_grad(set_to_none=True)
    return found


CASES = [("torchvision:resnet18", {"image_size": 64}), ("demo:transformer", {}), ("demo:cnn", {})]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradients_and_statistics_stay_bit_for_bit(name: str, options: dict[str, object]) -> None:
    work = vdnn.load(name, batch=2, **options)
    torch.manual_seed(0)
    model = work.build()
    plain = copy.deepcopy(model)
    expected = step(plain, work) + step(plain, work)
    keys = list(model.state_dict())
    undo = checkpoint_blocks(model)
    packs: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packs.append(t.numel()) or t, lambda t: t):
        got = step(model, work)
    checkpointed = len(packs)
    got += step(model, work)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert list(model.state_dict()) == keys
    undo()
    packs.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packs.append(t.numel()) or t, lambda t: t):
        step(model, work)
    assert checkpointed < len(packs) // 2
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_copy_of_a_checkpointed_model_computes_with_its_own_weights() -> None:
    work = vdnn.load("demo:transformer", batch=1)
    model = work.build()
    undo = checkpoint_blocks(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        args, _ = work.inputs("cpu")
        assert float(twin(*args).detach().abs().max()) == 0.0
    undo()


def test_blocks_can_be_named_and_wrong_names_are_told() -> None:
    model = vdnn.load("demo:transformer", batch=1).build()
    undo = checkpoint_blocks(model, ["blocks.1", "blocks.2*"])
    assert [fqn for fqn, m in model.named_modules() if "forward" in m.__dict__] == ["blocks.1", "blocks.2"]
    with pytest.raises(EngineError, match=r"blocks\.1 is checkpointed already"):
        checkpoint_blocks(model, ["blocks.1"])
    undo()
    with pytest.raises(UsageError, match=r"no module of SmallTransformer is named like 'layer\.\*'"):
        checkpoint_blocks(model, ["layer.*"])
    with pytest.raises(UsageError, match="VGG has no repeated blocks"):
        checkpoint_blocks(vdnn.load("torchvision:vgg11", batch=1).build())


def test_without_gradients_nothing_is_recomputed() -> None:
    work = vdnn.load("demo:transformer", batch=1)
    model = work.build().eval()
    args, _ = work.inputs("cpu")
    expected = model(*args).detach()
    checkpoint_blocks(model)
    with torch.no_grad():
        assert torch.equal(model(*args), expected)


class Given(nn.Module):
    """A block whose norm is not a part of it: the network gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act = nn.Linear(4, 4), nn.GELU()

    def forward(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return self.act(norm(self.one(x)))


class Giving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.blocks = nn.BatchNorm1d(4), nn.ModuleList([Given(), Given()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, self.norm)
        return x


def test_statistics_of_a_module_that_a_block_is_given_are_counted_once() -> None:
    model = Giving()
    plain, x = copy.deepcopy(model), torch.randn(6, 4)
    checkpoint_blocks(model)
    for one in (plain, model):
        one(x).square().mean().backward()
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), model.buffers(), strict=True))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


class Carrying(nn.Module):
    """A block that adds what it gave the last time, under its own weights or others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.drop, self.last = nn.Linear(4, 4), nn.Dropout(0.5), torch.zeros(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(torch.tanh(self.one(x * self.last.cos())))
        self.last = y.detach().mean(0)
        return x + y


@pytest.mark.parametrize("fast", [False, True], ids=["own weights", "fast weights"])
def test_a_block_is_recomputed_with_the_weights_and_the_state_of_its_forward(fast: bool) -> None:
    """A state that a block carries, and weights of `functional_call`, were those of the next call: wrong gradients."""
    plain = nn.Sequential(nn.Linear(4, 4), Carrying(), Carrying())
    model, x = copy.deepcopy(plain), torch.randn(6, 4)
    checkpoint_blocks(model)
    outcomes = []
    for one in (plain, model):
        torch.manual_seed(0)
        weights = dict(one.named_parameters())
        if fast:
            slopes = torch.autograd.grad(one(x).square().mean(), list(weights.values()), create_graph=True)
            weights = {name: p - 0.5 * s for (name, p), s in zip(weights.items(), slopes, strict=True)}
        (torch.func.functional_call(one, weights, (x,)) + one(x)).square().mean().backward()
        outcomes.append([p.grad for p in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
