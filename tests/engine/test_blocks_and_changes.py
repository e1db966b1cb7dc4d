"""Blocks that run again although something was changed meanwhile: what is trained, a tensor in place, other plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import vdnn
from tests.engine.steps import EVERYTHING, GPU, again, planned, same
from vdnn.analysis.blocks import block_actions, blocks
from vdnn.analysis.moments import Points
from vdnn.engine import Schedule, VirtualDevice, wrap_model
from vdnn.errors import FormatError
from vdnn.policies import decide
from vdnn.values import Keep, Plan, Recompute

WIDTH = 8


class Block(nn.Module):
    """Multiplies what it is given, a parameter, attributes and a list's tensors, all of one form."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.rand(WIDTH, WIDTH))
        self.own, self.several = torch.rand(WIDTH, WIDTH), [torch.rand(WIDTH, WIDTH)]
        self.register_buffer("made", torch.rand(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        y = self.two(self.act(self.one(x)))
        for other in (self.gain, given, self.own, self.several[0], self.get_buffer("made")):
            y = y.tanh() * other
        return x + y.tanh().sigmoid()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.given = nn.Parameter(torch.rand(WIDTH, WIDTH))
        self.blocks = nn.ModuleList([Block() for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, self.given)
        return self.head(x)

    def tensors(self, what: str) -> list[torch.Tensor]:
        if what == "given":
            return [self.given]
        each = [
            {
                "all": [*block.parameters()],
                "weight": [block.one.weight],
                "gain": [block.gain],
                "own": [block.own],
                "several": block.several,
                "made": [block.get_buffer("made")],
            }[what]
            for block in self.blocks
            if isinstance(block, Block)
        ]
        return [tensor for tensors in each for tensor in tensors]


def outcome(model: nn.Module, meanwhile: Callable[[], None] = lambda: None) -> list[torch.Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    out = model(torch.randn(WIDTH, WIDTH))
    meanwhile()
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("trained", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("what", ["all", "weight", "gain", "given", "own", "several", "made"])
def test_what_is_trained_may_change_between_forward_and_backward(what: str, trained: bool) -> None:
    """A block whose gain was frozen meanwhile saved other tensors when it ran again: wrong gradients, and no error."""
    outcomes, flags = [], []
    for ours in (False, True):
        torch.manual_seed(0)
        model = Net()

        def set_all(to: bool, model: Net = model) -> None:
            for tensor in model.tensors(what):
                tensor.requires_grad_(to)

        set_all(trained)
        if ours:
            vdnn.wrap(model, policy="recompute-blocks", device=VirtualDevice(), min_bytes=1, keep_soon=False)
        outcomes.append(outcome(model, lambda set_all=set_all: set_all(not trained)))
        flags.append([tensor.requires_grad for tensor in model.tensors(what)])
        if ours:
            report = vdnn.report(model)
            assert report.dropped_storages >= 10
            assert not report.mismatches
    assert same(*outcomes)
    assert flags[0] == flags[1]


@pytest.mark.parametrize("given", [True, False], ids=["one plan", "a plan for each"])
def test_blocks_may_be_frozen_in_every_second_step(given: bool) -> None:
    outcomes = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = Net()
        if ours:
            plan = planned(model, torch.randn(WIDTH, WIDTH), "recompute-blocks") if given else None
            options = {} if given else {"policy": "recompute-blocks", "min_bytes": 1, "keep_soon": False}
            vdnn.wrap(model, plan=plan, device=VirtualDevice(), **options)  # type: ignore[arg-type]
        found = []
        for number in range(4):
            for tensor in model.tensors("all"):
                tensor.requires_grad_(number % 2 == 0)
            found += outcome(model)
        outcomes.append(found)
    assert same(*outcomes)


def test_blocks_under_torch_s_checkpoint_may_be_frozen_meanwhile() -> None:
    outcomes = []
    for policy in ("", "checkpoint", "checkpoint-offload"):
        torch.manual_seed(0)
        model = Net()
        if policy:
            vdnn.wrap(model, policy=policy, device=VirtualDevice(), min_bytes=1)
        outcomes.append(outcome(model, lambda model=model: [p.requires_grad_(False) for p in model.tensors("all")]))
    assert same(outcomes[0], outcomes[1])
    assert same(outcomes[0], outcomes[2])


class Watched(nn.Module):
    """Saves a tensor twice, and changes it in place in between; whoever made the first use of it does not want it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        self.gain, self.scale = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))
        self.watched = torch.zeros(())
        self.unsound = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.two(self.act(self.one(x)))
        self.watched = y * self.gain
        y += 1
        y = y * self.scale
        return y + self.watched if self.unsound else y


def test_what_was_saved_twice_and_changed_in_between_comes_back_as_it_was_the_second_time() -> None:
    """The run stopped at the first of the two: gradients were those of what was there before the change."""
    outcomes = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Watched(), Watched(), nn.Linear(WIDTH, WIDTH))
        if ours:
            vdnn.wrap(model, policy="recompute-blocks", device=VirtualDevice(), min_bytes=1, keep_soon=False)
        outcomes.append(outcome(model))
        if ours:
            assert vdnn.report(model).dropped_storages == 6
            assert not vdnn.report(model).mismatches
            model[1].unsound = True  # type: ignore[assignment]
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                outcome(model)
    assert same(*outcomes)


class Nested(nn.Module):
    """Blocks in a block, or a block that calls itself."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        self.inner, self.late, self.drop = inner, nn.LayerNorm(WIDTH), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
        y = self.two(self.act(self.one(x)))
        if self.inner is not None:
            y = self.inner(y, 0)
        elif depth:
            y = self(y, depth - 1)
        return self.late(self.drop(x + y)).sigmoid()


NESTED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "in each other": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Nested(Nested())), ["1.inner#0", "1#0"]),
    "of itself": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Nested()), ["1#1", "1#0"]),
    "a module in one": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Nested(Nested())), ["", "1#0"]),
}


def by_hand(model: nn.Module, calls: list[str]) -> Plan:
    """A plan whose blocks are these calls; what two of them drop is the first one's."""
    trace = vdnn.capture(model, torch.randn(WIDTH, WIDTH), device="cpu")
    points, possible = Points(trace), blocks(trace)
    actions: dict[int, Recompute] = {}
    for text in filter(None, calls):
        actions = block_actions(points, possible[points.call(f"end {text}")]) | actions
    plan = decide("recompute-blocks", trace, GPU, EVERYTHING)
    entries = []
    for entry in plan.entries:
        action = actions.get(trace.saved[points.find(entry.saved[0])].storage) or Keep()
        if "" in calls and str(entry.saved[0]) == "1.two#0/0":
            action = Recompute("cheap", ("1.act#0",), "1.act#0/0")
        entries.append(replace(entry, action=action))
    return replace(plan, entries=tuple(entries))


@pytest.mark.parametrize("name", NESTED)
def test_a_plan_of_blocks_in_each_other_is_refused(name: str) -> None:
    make, calls = NESTED[name]
    plan = by_hand(make(), calls)
    with pytest.raises(FormatError, match=r"name one of them|which is computed again itself"):
        vdnn.wrap(make(), plan=plan, device=VirtualDevice())
    trace = vdnn.capture(make(), torch.randn(WIDTH, WIDTH), device="cpu")
    with pytest.raises(FormatError, match=r"name one of them|which is computed again itself"):
        vdnn.simulate(trace, plan)


@pytest.mark.parametrize("name", NESTED)
def test_a_block_that_begins_inside_another_stays(name: str) -> None:
    """The inner one's end was taken for the outer one's, and the next module of that was unknown: a `KeyError`."""
    make, calls = NESTED[name]
    outcomes = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = make()
        if ours:
            schedule = Schedule(by_hand(model, calls))
            assert again(schedule.plan)  # type: ignore[arg-type]
            engine = wrap_model(model, VirtualDevice(), lambda *_, schedule=schedule: schedule)
        outcomes.append(outcome(model))
    assert same(*outcomes)
    assert engine.offloader.counts.recomputed_storages == engine.offloader.counts.dropped_storages > 0


class Reaching(nn.Module):
    """A block that counts statistics of a module that is not its own, and does not call it."""

    def __init__(self, norm: nn.Module, how: str) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        self.norm, self.how = [norm], how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = self.norm[0].get_buffer("running_mean"), self.norm[0].get_buffer("running_var")
        y = self.one(x)
        if self.how == "reads":
            y = y - mean
        elif self.how == "writes":
            mean.data.mul_(0.9).add_(y.detach().mean(0))
        else:
            y = nn.functional.batch_norm(y, mean, var, training=True)
        return x + self.two(self.act(y))


@pytest.mark.parametrize("how", ["reads", "writes", "batch norm"])
def test_a_block_that_writes_another_module_s_buffers_is_no_block(how: str) -> None:
    """They were counted twice: a batch norm writes without a version, and they are not the block's to put back."""
    outcomes = []
    for ours in (False, True):
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(WIDTH)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, Reaching(norm, how), Reaching(norm, how))
        if ours:
            assert len(blocks(vdnn.capture(model, torch.randn(WIDTH, WIDTH), device="cpu"))) == 2 * (how == "reads")
            vdnn.wrap(model, policy="recompute-blocks", device=VirtualDevice(), min_bytes=1, keep_soon=False)
        outcomes.append([*outcome(model), *outcome(model), *model.buffers()])
    assert same(*outcomes)


def test_tensors_that_were_made_in_inference_mode_may_be_given_and_kept() -> None:
    class Shifted(Nested):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.shift = shift
            self.register_buffer("other", shift)

        def forward(self, x: torch.Tensor, depth: int = 0) -> torch.Tensor:
            return x + self.two(self.act(self.one(x + self.shift))) + self.get_buffer("other")

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList([Shifted() for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = block(x + 0, given)
            return x

    with torch.inference_mode():
        shift, given = torch.rand(WIDTH), torch.rand(WIDTH)
    outcomes = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = Given()
        if ours:
            vdnn.wrap(model, policy="recompute-blocks", device=VirtualDevice(), min_bytes=1, keep_soon=False)
        outcomes.append(outcome(model))
    assert same(*outcomes)
    assert vdnn.report(model).dropped_storages


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.act = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU()
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.act(self.norm(self.one(x))))


def _twice(loss: torch.Tensor, out: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    loss.backward(retain_graph=True)
    return []


def _partly(loss: torch.Tensor, out: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    return [*torch.autograd.grad(loss, [x], retain_graph=True), *torch.autograd.grad(out[0, 0], [x], retain_graph=True)]


def _penalty(loss: torch.Tensor, out: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    (slope,) = torch.autograd.grad(loss, [x], create_graph=True)
    slope.square().sum().backward(retain_graph=True)
    return [slope.detach()]


def _batched(loss: torch.Tensor, out: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    each = torch.eye(out.numel())[:5].reshape(5, *out.shape)
    return list(torch.autograd.grad(out, [x], each, is_grads_batched=True, retain_graph=True))


def _vmapped(loss: torch.Tensor, out: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    each = torch.eye(out.numel())[:5].reshape(5, *out.shape)
    return [torch.vmap(lambda g: torch.autograd.grad(out, [x], g, retain_graph=True)[0])(each)]


def _evaluating(loss: torch.Tensor, out: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    return []


@pytest.mark.parametrize("how", [_twice, _partly, _penalty, _batched, _vmapped, _evaluating])
@pytest.mark.parametrize("policy", ["recompute-blocks", "checkpoint", "checkpoint-offload"])
def test_backward_in_every_way(policy: str, how: Callable[..., list[torch.Tensor]]) -> None:
    """Under `checkpoint` a graph that was retained ended in an `AttributeError`, and evaluation mode in torch's error;
    in a vmap no block with dropout ran again."""
    outcomes = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Normed(), Normed())
        if ours:
            vdnn.wrap(model, policy=policy, device=VirtualDevice(), min_bytes=1, keep_soon=False)
        found: list[torch.Tensor] = []
        for number in range(2):
            torch.manual_seed(number)
            model.zero_grad()
            x = torch.randn(WIDTH, WIDTH, requires_grad=True)
            out = model(x)
            loss = out.square().mean()
            found += how(loss, out, x)
            model.train(how is not _evaluating)
            loss.backward()
            model.train()
            found += [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        outcomes.append([*found, *(b.clone() for b in model.buffers())])
    assert same(*outcomes)
