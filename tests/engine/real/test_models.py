"""Real models: three steps with and without offload, every bit of outputs, gradients, buffers and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.engine.real.comparing import Case, Training, baseline, compare
from tests.engine.real.networks import network, networks

# Of each source one, in the quick tests.
QUICK = ("torchvision:mobilenet_v3_small", "timm:resnest14d", "hf:gpt2")


def _parameters() -> list[Any]:
    found = []
    for name, options in networks():
        slow = [] if name in QUICK else [pytest.mark.slow]
        found.append(pytest.param("cpu", name, options, id=f"virtual-{name}", marks=slow))
        found.append(pytest.param("cuda", name, options, id=f"cuda-{name}", marks=[pytest.mark.gpu, *slow]))
    return found


# How a network is run. Where blocks run again nothing leaves, so nothing but the bits is compared.
WAYS = ("vdnn-all", "recompute-offload", "recompute-blocks", "encode-offload")


@pytest.mark.case(2, 3, 7)
@pytest.mark.parametrize(("kind", "name", "options"), _parameters())
def test_a_network(kind: str, name: str, options: dict[str, Any]) -> None:
    """Feature maps move, are made again by cheap modules or by whole blocks, or are kept as codes: the same bits."""
    _exact(network(name, options), kind, WAYS)


def _exact(case: Case, kind: str, ways: Sequence[str] = ("vdnn-all",)) -> None:
    plain = baseline(case, kind)
    if plain.differs:
        pytest.skip(f"{case} differs from itself without offload: {plain.differs}")
    for way in ways:
        outcome = compare(replace(case, options={**case.options, "policy": way}), plain)
        assert outcome.differs == "", way
        assert outcome.compared > 0, way
        assert outcome.offloaded_bytes > 0 or way == "recompute-blocks", way


class Recurrent(nn.Module):
    """Cells, unrolled by a loop: each step's values are saved."""

    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 64)
        self.cell = cell(64, 64)
        self.head = nn.Linear(64, 31)

    def forward(self, tokens: Tensor) -> Tensor:
        state: Any = torch.zeros(tokens.shape[0], 64, device=tokens.device)
        if isinstance(self.cell, nn.LSTMCell):
            state = (state, state)
        outputs = []
        for step in range(tokens.shape[1]):
            state = self.cell(self.embed(tokens[:, step]), state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(outputs, 1))


class Library(nn.Module):
    """torch's own recurrent layers."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 64)
        self.layer = layer(64, 64, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(64, 31)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(tokens))[0])


def _language(make: Any, lengths: Sequence[tuple[int, int]]) -> Any:
    """Next-token training; `lengths` are (batch, sequence) of each step."""

    def made(kind: str) -> Training:
        model = make().to(kind)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

        def step(number: int) -> list[Tensor]:
            tokens = torch.randint(0, 31, lengths[number % len(lengths)], device=kind)
            optimizer.zero_grad()
            logits = model(tokens)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            return [loss.detach(), logits.detach()]

        return Training({"model": model}, step)

    return made


def _gan(kind: str) -> Training:
    """Two models, two losses, and a `detach` between them."""
    generator = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.Tanh()).to(kind)
    critic = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(64, 1)).to(kind)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (generator, critic)]

    def step(number: int) -> list[Tensor]:
        real, noise = torch.randn(32, 64, device=kind), torch.randn(32, 16, device=kind)
        fake = generator(noise)
        optimizers[1].zero_grad()
        loss_critic = F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()
        loss_critic.backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        loss_generator = F.softplus(-critic(fake)).mean()
        loss_generator.backward()
        optimizers[0].step()
        return [loss_critic.detach(), loss_generator.detach(), fake.detach()]

    return Training({"generator": generator, "critic": critic}, step)


def _siamese(kind: str) -> Training:
    """One network on two inputs before one loss."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(288, 16)
    )
    model.to(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(number: int) -> list[Tensor]:
        left, right = (torch.randn(8, 3, 8, 8, device=kind) for _ in range(2))
        optimizer.zero_grad()
        loss = F.cosine_embedding_loss(model(left), model(right), torch.ones(8, device=kind))
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    return Training({"model": model}, step)


LONG = [(8, 24)]
TRAININGS = [
    Case("lstm cell, unrolled", _language(lambda: Recurrent(nn.LSTMCell), LONG)),
    Case("gru cell, unrolled", _language(lambda: Recurrent(nn.GRUCell), LONG)),
    Case("lstm", _language(lambda: Library(nn.LSTM), LONG)),
    Case("gru", _language(lambda: Library(nn.GRU), LONG)),
    Case("last batch of another size", _language(lambda: Recurrent(nn.GRUCell), [(8, 12), (8, 12), (3, 12)])),
    Case("changing sequence lengths", _language(lambda: Library(nn.LSTM), [(8, 12), (8, 20), (8, 7)])),
    Case("gan", _gan),
    Case("siamese", _siamese),
]


@pytest.mark.case(7, 11)
@pytest.mark.parametrize("case", TRAININGS, ids=str)
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["virtual", "cuda"])
def test_a_training(kind: str, case: Case) -> None:
    _exact(case, kind)
