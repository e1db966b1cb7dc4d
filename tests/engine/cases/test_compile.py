"""torch.compile around and inside a wrapped model: right results, and memory that is really saved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import vdnn
from tests.engine.cases.conftest import Ground, equal
from vdnn.engine import VirtualDevice, engine_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def network() -> nn.Module:
    return nn.Sequential(*[part for _ in range(3) for part in (nn.Linear(32, 32), nn.Tanh(), nn.LayerNorm(32))])


def gradients(model: nn.Module, parameters: nn.Module, x: Tensor) -> list[Tensor]:
    for parameter in parameters.parameters():
        parameter.grad = None
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in parameters.parameters())]


@pytest.mark.case(58)
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "compiled before"])
@pytest.mark.parametrize("where", ["around the wrapped model", "inside, in place", "inside, a part"])
def test_compiled_models_give_the_same_numbers(ruled: Ground, where: str, guarded: bool) -> None:
    torch._dynamo.reset()
    # not guarded: as it is before the first wrap of a process
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=not guarded):
        torch.manual_seed(0)
        plain = network().to(ruled.kind)
        ours = copy.deepcopy(plain)
        x = torch.randn(64, 32, device=ruled.kind)
        backend = "aot_eager"
        if where == "around the wrapped model":
            expected = gradients(torch.compile(plain, backend=backend), plain, x)
            ruled.wrap(ours)
            run = torch.compile(ours, backend=backend)
        elif where == "inside, in place":
            plain.compile(backend=backend)
            expected = gradients(plain, plain, x)
            ours.compile(backend=backend)
            run = ruled.wrap(ours)
        else:
            plain[3].compile(backend=backend)
            expected = gradients(plain, plain, x)
            ours[3].compile(backend=backend)
            run = ruled.wrap(ours)
        for _ in range(2):
            assert equal(gradients(run, ours, x), expected)
        assert engine_of(ours).offloader.counts.offloaded_bytes > 0, "compiled, and nothing is saved"
        ruled.nothing_left()
        torch._dynamo.reset()


@pytest.mark.case(58)
@pytest.mark.parametrize("first", ["plain", "wrapped"])
def test_compiled_code_is_not_shared_with_models_that_are_not_wrapped(ruled: Ground, first: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = network().to(ruled.kind)
    ours = ruled.wrap(copy.deepcopy(plain))
    x = torch.randn(64, 32, device=ruled.kind)
    models = {"plain": torch.compile(plain, backend="aot_eager"), "wrapped": torch.compile(ours, backend="aot_eager")}
    found = {}
    for name in (first, *(name for name in models if name != first)):
        found[name] = gradients(models[name], plain if name == "plain" else ours, x)
    assert equal(found["plain"], found["wrapped"])
    counts = engine_of(ours).offloader.counts
    assert counts.passes == 1
    assert counts.offloaded_bytes > 0
    torch._dynamo.reset()


@pytest.mark.case(58)
@pytest.mark.parametrize("where", ["around the wrapped model", "inside, in place", "inside, a part"])
def test_a_compiled_model_with_a_policy_is_offloaded_by_rule_and_says_so(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The first call failed (a capture inside the compiled region), or the plan moved nothing and nobody said so."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = network()
    ours, x = copy.deepcopy(plain), torch.randn(64, 32)
    run: nn.Module = ours
    if where == "around the wrapped model":
        expected = gradients(torch.compile(plain, backend="aot_eager"), plain, x)
        run = torch.compile(ours, backend="aot_eager")
    elif where == "inside, in place":
        plain.compile(backend="aot_eager")
        ours.compile(backend="aot_eager")
        expected = gradients(plain, plain, x)
    else:
        plain[3].compile(backend="aot_eager")
        ours[3].compile(backend="aot_eager")
        expected = gradients(plain, plain, x)
    vdnn.wrap(ours, policy="vdnn-all", device=VirtualDevice(seed=1), min_bytes=1)
    for _ in range(2):
        assert equal(gradients(run, ours, x), expected)
    assert vdnn.report(ours).offloaded_bytes > 0
    assert "runs as compiled code" in caplog.text
    vdnn.unwrap(ours)
    torch._dynamo.reset()
