"""Feature maps that the engine drops and computes again: the same bits, less memory, and nothing dropped on a guess."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import vdnn
from tests.engine.steps import EVERYTHING, GPU, again, or_error, planned, same, trained
from vdnn.analysis.chains import action_of, chains
from vdnn.analysis.moments import Points
from vdnn.analysis.recomputing import recomputed
from vdnn.engine import Schedule, VirtualDevice, engine_of
from vdnn.errors import DeviceOutOfMemory, FormatError, PlanMismatchError
from vdnn.policies import decide
from vdnn.policies.plans import make_plan
from vdnn.sim import simulate_step
from vdnn.values import Plan, Recompute
from vdnn.values.plan import Action


class Residual(nn.Module):
    """A block whose sum is no module's output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(self.act(self.norm(x)))


class Gated(nn.Module):
    """Squeeze and excite: the pool's output is made again by way of what its gate multiplied, which is gone by then."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.pool = nn.GELU(), nn.AdaptiveAvgPool2d(1)
        self.squeeze, self.gate = nn.Conv2d(8, 8, 1), nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(x)
        return x * self.gate(self.squeeze(self.pool(x)))


class ChannelsLastNorm(nn.LayerNorm):
    """A norm over channels that sits between two permutations, as in ConvNeXt."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), nn.SiLU(inplace=True), nn.Conv2d(8, 8, 1), nn.Hardswish(),
        nn.Upsample(scale_factor=2), Residual(8), ChannelsLastNorm(8), nn.Conv2d(8, 4, 1), nn.GroupNorm(2, 4),
        nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(196, 5),
    )  # fmt: skip


def words() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.3), nn.Linear(32, 16),
        nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3),
    )  # fmt: skip


def gated() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), Gated(), nn.Conv2d(8, 8, 3), Gated(), nn.Flatten(), nn.Linear(128, 5))


def shared() -> nn.Module:
    act, norm = nn.Sigmoid(), nn.BatchNorm1d(16)
    return nn.Sequential(nn.Linear(16, 16), norm, act, nn.Linear(16, 16), norm, act, nn.Linear(16, 3))


LARGE = ("torchvision:densenet121", "timm:convnext_atto", "hf:gpt2")
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "images": (images, (4, 3, 18, 18)),
    "words": (words, (6, 16)),
    "shared": (shared, (6, 16)),
    "gated": (gated, (2, 3, 8, 8)),
}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    return make(), torch.randn(shape)


def wrapped(model: nn.Module, plan: Plan, device: VirtualDevice | None = None) -> nn.Module:
    return vdnn.wrap(model, plan=plan, device=device or VirtualDevice(seed=1))


@pytest.mark.parametrize("policy", ["recompute", "recompute-offload"])
@pytest.mark.parametrize("name", MODELS)
def test_every_bit_is_the_same(name: str, policy: str) -> None:
    expected = trained(*made(name))
    model, x = made(name)
    plan = planned(model, x, policy)
    assert len(again(plan)) >= {"images": 9, "words": 2, "shared": 2, "gated": 4}[name]
    device = VirtualDevice(seed=3)
    wrapped(model, plan, device)
    got = trained(model, x)
    device.finish()
    assert same(got, expected)
    counts = engine_of(model).offloader.counts
    assert counts.dropped_storages == 3 * len(again(plan))
    assert counts.recomputed_storages == 3 * len(again(plan))
    assert not counts.mismatches
    assert device.host_bytes()[0] == 0
    assert "computed again" in str(vdnn.report(model))


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_mode_and_autocast(name: str) -> None:
    for mode in (False, True):
        outcomes = []
        for ours in (False, True):
            model, x = made(name)
            model.train(mode)
            if ours:
                wrapped(model, planned(model, x, "recompute"))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode):
                outcomes.append(trained(model, x))
        assert same(*outcomes), f"training {mode}"


@pytest.mark.parametrize("policy", ["recompute", "recompute-offload"])
@pytest.mark.parametrize("name", ["demo:cnn", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_the_peak_is_the_predicted_one(name: str, policy: str) -> None:
    options = {"demo:cnn": {}, "hf:gpt2": {"layers": 2, "sequence": 32}}.get(name, {"image_size": 32})
    work = vdnn.load(name, batch=4, **options)
    result = vdnn.run(work, policy, GPU, device="virtual", steps=2, min_bytes=4096)
    assert result.exact
    assert result.measured.peak_requested_bytes == result.predicted.peak_requested_bytes


class Unpooled(nn.Module):
    """A pool that gives its indices, too, for what is undone later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.pool, self.middle = nn.MaxPool2d(2, return_indices=True), nn.Conv2d(8, 8, 1)
        self.unpool, self.last = nn.MaxUnpool2d(2), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled, indices = self.pool(self.act(self.norm(self.first(x))))
        out: torch.Tensor = self.last(self.unpool(self.middle(pooled), indices))
        return out


@pytest.mark.parametrize("policy", ["recompute", "recompute-offload"])
def test_a_pool_that_gives_its_indices_is_not_planned_to_run_again(policy: str) -> None:
    """The engine keeps what a call makes that gives a tuple; the plan counted it as dropped, and too little memory."""
    torch.manual_seed(0)
    model, x = Unpooled(), torch.randn(4, 3, 16, 16)
    trace = vdnn.capture(model, x, device="cpu")
    plan = decide(policy, trace, GPU, EVERYTHING)
    assert "pool#0" not in {call for action in again(plan) for call in action.through}
    device = VirtualDevice(seed=1)
    wrapped(model, plan, device)
    trained(model, x)
    assert engine_of(model).offloader.counts.dropped_storages == 3 * len(again(plan)) > 0


def test_less_memory_and_more_time() -> None:
    model, x = made("images")
    trace = vdnn.capture(model, x, device="cpu")
    base, ours = (simulate_step(trace, plan, GPU) for plan in (None, decide("recompute", trace, GPU, EVERYTHING)))
    assert ours.peak_requested_bytes < base.peak_requested_bytes
    assert ours.iteration_time_ns > base.iteration_time_ns


def test_what_is_beside_a_module_s_output_has_no_chain() -> None:
    """A norm's statistics and a pool's indices are made by cheap modules, too, but are not what these return."""
    model, x = made("images")
    trace = vdnn.capture(model, x, device="cpu")
    found = chains(trace)
    outputs = {s for s in found if trace.storages[s].nbytes >= 4 * 8 * 4}
    assert set(found) == outputs
    for t in trace.saved:
        if t.dtype == "int64":
            assert t.storage not in found


def test_a_source_that_leaves_comes_back_in_time() -> None:
    """Under recompute-offload the copy back of a convolution's output begins before the maps made from it are due."""
    model, x = made("images")
    trace = vdnn.capture(model, x, device="cpu")
    plan = decide("recompute-offload", trace, GPU, EVERYTHING)
    step = recomputed(trace, plan)
    step.check()
    sources = {action.source for action in again(plan)}
    offloaded = {str(name) for e in plan.entries if e.action.action == "offload" for name in e.saved}
    assert sources & offloaded, "no source is offloaded: the test tests nothing"
    assert simulate_step(trace, plan, GPU).prefetched_bytes == plan.offloaded_bytes


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for width in (3, 8, 8) for layer in (nn.Conv2d(width, 8, 3), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(800, 5))


def test_a_convolution_is_made_again_under_autocast_and_the_next_forward_still_trains_its_weights() -> None:
    """Autocast keeps its copies of weights for forward: they are nothing that the layer gives. In a backward inside
    autocast weights are copied without gradients, which the forward after it must not use.
    """
    x = torch.randn(4, 3, 16, 16)
    trace = vdnn.capture(convolutions(), x, device="cpu", precision="amp-bf16")
    found, points = chains(trace, costly=True), Points(trace)
    assert [chain.calls for chain in found.values()] == [(3, 4), (5, 6)]  # of the first layer's input a copy is saved
    kept = {t.storage: "" for t in trace.saved}
    actions: dict[int, Action] = {s: action_of(points, chain) for s, chain in found.items()}
    plan = make_plan("recompute", trace, EVERYTHING, actions, kept)
    outcomes = []
    for given in (None, plan):
        model = convolutions()
        if given is not None:
            vdnn.wrap(model, plan=given, device=VirtualDevice())
        with torch.autocast("cpu", torch.bfloat16):
            first = model(x).float().square().mean()
        with torch.autocast("cpu", torch.bfloat16):
            first.backward()
            second = model(x).float().square().mean()
        second.backward()
        outcomes.append([first, second, *(p.grad for p in model.parameters() if p.grad is not None)])
        if given is not None:
            assert engine_of(model).offloader.counts.dropped_storages == 2 * len(found)
    assert len(outcomes[0]) == 2 + len(list(convolutions().parameters()))
    assert same(*outcomes)


class Repeated(nn.Module):
    """One layer that is called three times: autocast copies its weight in the first call alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(x))
        for _ in range(3):
            x = self.act(self.again(x))
        return x


def test_a_copy_of_a_weight_that_several_calls_read_is_not_made_again_by_the_first() -> None:
    """That call gives its output, and no copy: nothing would be dropped where a plan counts on it."""
    trace = vdnn.capture(Repeated(), torch.randn(2, 3, 8, 8), device="cpu", precision="amp-bf16")
    found = chains(trace, costly=True)
    assert [[trace.modules[call].fqn for call in chain.calls] for chain in found.values()] == [["again", "act"]]
    assert any(trace.storages[t.storage].name == "cast of again.weight" for t in trace.saved)


def test_a_module_that_gives_what_it_made_of_its_weight_is_not_planned_to_run_again() -> None:
    """Such a thing is no copy of autocast's, which lives as long: the engine makes no call again that gives two."""

    class Two(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.doubled = self.weight * 2
            return super().forward(x)

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.two, self.act, self.last = nn.Conv2d(3, 4, 1), Two(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.last(self.act(self.two(self.act(self.first(x)))))
            return x + self.two.doubled.sum()

    trace = vdnn.capture(Uses(), torch.randn(2, 3, 8, 8), device="cpu", precision="amp-bf16")
    through = [trace.modules[call].fqn for chain in chains(trace, costly=True).values() for call in chain.calls]
    assert "two" not in through


class Doubling:
    def __call__(self, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output * 2


def test_a_hook_that_changes_an_output_keeps_it() -> None:
    outcomes = []
    for ours in (False, True):
        model, x = made("words")
        assert isinstance(model, nn.Sequential)
        plan = planned(model, x, "recompute")
        model[1].register_forward_hook(Doubling())
        if ours:
            wrapped(model, plan)
        outcomes.append(trained(model, x))
        if ours:
            assert any("forward hooks" in text for text in vdnn.report(model).mismatches)
    assert same(*outcomes)


def test_a_hook_that_comes_later_keeps_it_too() -> None:
    outcomes = []
    for ours in (False, True):
        model, x = made("words")
        assert isinstance(model, nn.Sequential)
        if ours:
            wrapped(model, planned(model, x, "recompute"))
        trained(model, x, 1)
        model[7].register_forward_hook(Doubling())
        outcomes.append(trained(model, x))
    assert same(*outcomes)


class Copying:
    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(arg.clone() for arg in args)


def test_what_a_module_packs_before_its_chain_turns_out_to_be_broken_is_not_counted_as_dropped() -> None:
    """And the report names it: the step needs more memory than was planned."""
    outcomes = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sigmoid(), nn.Linear(4, 4))
        x = torch.randn(3, 4)
        plan = planned(model, x, "recompute")
        assert any(action.through == ("1#0", "2#0") for action in again(plan))
        model[2].register_forward_pre_hook(Copying())
        if ours:
            wrapped(model, plan)
        outcomes.append(trained(model, x, 1))
        if ours:
            report = vdnn.report(model)
            named = [text.split(":")[0] for text in report.mismatches]
            assert named == ["2#0/0 is not computed again", "3#0/0 is not computed again"]
            assert report.dropped_storages == engine_of(model).offloader.counts.recomputed_storages == 0
            assert report.dropped_bytes == 0
    assert same(*outcomes)


class TakesAnother(nn.Module):
    """Calls its norm by keyword, and its activation on something else than the norm's output, if asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.ReLU()
        self.out = nn.Conv1d(4, 4, 1)
        self.way = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        y = self.norm(input=y) if self.way == "keyword" else self.norm(y)
        if self.way == "between":
            y = y * 2
        y = self.act(y)
        if self.way == "after":
            y.mul_(2)
        return self.out(y)


@pytest.mark.parametrize("way", ["keyword", "between", "after"])
def test_a_step_that_differs_from_the_plan_keeps_what_it_must(way: str) -> None:
    outcomes = []
    for ours in (False, True):
        torch.manual_seed(0)
        model, x = TakesAnother(), torch.randn(3, 4, 5)
        if ours:
            plan = planned(model, x, "recompute")
            assert again(plan)
            wrapped(model, plan)
        model.way = way
        outcomes.append(or_error(lambda model=model, x=x: trained(model, x, 1)))
    if isinstance(outcomes[0], str):
        assert "modified by an inplace operation" in outcomes[0]
        assert outcomes[1] == outcomes[0]
    else:
        assert same(*outcomes)


def test_a_source_that_was_changed_since_raises_as_eager_does() -> None:
    for ours in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        x = torch.randn(3, 4)
        seen: list[torch.Tensor] = []
        if ours:
            wrapped(model, planned(model, x, "recompute"))
        model[0].register_forward_hook(lambda m, a, o, seen=seen: seen.append(o))
        out = model(x).sum()
        with torch.no_grad():
            seen[0].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def test_a_weight_that_was_changed_since_raises() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    wrapped(model, planned(model, x, "recompute"))
    out = model(x).sum()
    with torch.no_grad():
        model[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_weight_that_was_replaced_since_is_the_old_one_in_backward() -> None:
    outcomes = []
    for ours in (False, True):
        model, x = made("words")
        assert isinstance(model, nn.Sequential)
        if ours:
            wrapped(model, planned(model, x, "recompute"))
        torch.manual_seed(7)
        out = model(x).sum()
        before = list(model.parameters())
        model[1].weight = nn.Parameter(torch.full((16,), 5.0))
        model[1].eval()
        out.backward()
        assert model[1].weight[0] == 5
        assert not model[1].training
        outcomes.append([p.grad for p in before])
    assert same(*outcomes)


def test_backward_twice_and_of_the_gradient() -> None:
    outcomes = []
    for ours in (False, True):
        model, x = made("images")
        x.requires_grad_()
        if ours:
            wrapped(model, planned(model, x, "recompute-offload"))
        out = model(x).square().mean()
        (first,) = torch.autograd.grad(out, x, create_graph=True)
        first.square().sum().backward(retain_graph=True)
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        out.backward()
        outcomes.append([first.detach(), *found, *(p.grad for p in model.parameters()), x.grad])
    assert same(*outcomes)


class Fragile(nn.Module):
    """An activation that fails when asked to, or gives something else."""

    def __init__(self) -> None:
        super().__init__()
        self.mood = deque([""])  # a list, too, is what it was when a module runs again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mood[0] == "fails":
            raise OSError("no mood")
        return torch.tanh(x[:1] if self.mood[0] == "shrinks" else x)


@pytest.mark.parametrize(("mood", "error"), [("fails", "no mood"), ("shrinks", "comes out another way")])
def test_a_module_that_fails_in_backward_leaves_nothing_behind(mood: str, error: str) -> None:
    torch.manual_seed(0)
    fragile = Fragile()
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), fragile, nn.Linear(4, 4))
    x = torch.randn(3, 4)
    expected = trained(model, x, 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), fragile, nn.Linear(4, 4))
    torch.randn(3, 4)
    plan = planned(model, x, "recompute")
    assert again(plan)
    device = VirtualDevice()
    wrapped(model, plan, device)
    with device:
        out = model(x).sum()
        fragile.mood[0] = mood
        with pytest.raises((OSError, RuntimeError), match=error):
            out.backward()
        fragile.mood[0] = ""
        del out
        got = trained(model, x, 1)
    assert same(got, expected)


def test_no_room_to_compute_it_again_is_out_of_memory_and_the_next_step_is_exact() -> None:
    expected = trained(*made("images"), 1)
    model, x = made("images")
    plan = planned(model, x, "recompute")
    device = VirtualDevice(memory="1GiB")
    wrapped(model, plan, device)
    with device:
        out = model(x).square().mean()
        device.account.limit_bytes = device.account.live_bytes()
        with pytest.raises(DeviceOutOfMemory):
            out.backward()
        del out
        device.account.limit_bytes = 1 << 30
        got = trained(model, x, 1)
    changed = len(list(model.buffers()))  # the first forward updated the statistics
    assert all(torch.equal(a, b) for a, b in zip(got[:-changed], expected[:-changed], strict=True))


def test_nothing_grows() -> None:
    model, x = made("images")
    device = VirtualDevice()
    wrapped(model, planned(model, x, "recompute-offload"), device)
    live = []
    with device:
        for _ in range(30):
            trained(model, x, 1)
            live.append(device.account.live_bytes())
    assert live[-1] == live[3]
    assert device.host_bytes()[0] == 0


def test_a_plan_that_names_what_is_not_there() -> None:
    model, x = made("words")
    trace = vdnn.capture(model, x, device="cpu")
    plan = decide("recompute", trace, GPU, EVERYTHING)
    place = next(i for i, e in enumerate(plan.entries) if isinstance(e.action, Recompute))
    action = plan.entries[place].action

    def with_action(new: Recompute) -> Plan:
        entries = list(plan.entries)
        entries[place] = replace(entries[place], action=new)
        return replace(plan, entries=tuple(entries))

    assert isinstance(action, Recompute)
    with pytest.raises(PlanMismatchError, match="nowhere"):
        simulate_step(trace, with_action(replace(action, through=("nowhere#0",))), GPU)
    with pytest.raises(PlanMismatchError, match="does not pack"):
        simulate_step(trace, with_action(replace(action, source="0#0/9")), GPU)
    with pytest.raises(PlanMismatchError, match="something else"):
        simulate_step(trace, with_action(replace(action, through=("0#0",))), GPU)
    with pytest.raises(FormatError, match="say together"):
        with_action(replace(action, source="")).check()
    with pytest.raises(PlanMismatchError, match="nowhere"):
        Schedule(with_action(replace(action, through=("nowhere#0",)))).check_names(
            {name for name, _ in model.named_modules()}
        )


def test_a_plan_that_makes_two_feature_maps_from_each_other_is_refused() -> None:
    """Neither would ever be there."""
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.GELU(), nn.GELU(), nn.Linear(4, 4))
    trace = vdnn.capture(model, torch.randn(2, 4), device="cpu")
    plan = decide("recompute", trace, GPU, EVERYTHING)

    def with_ways(ways: dict[str, tuple[str, ...]], source: str = "") -> Plan:
        entries = (
            replace(e, action=replace(e.action, through=ways[str(e.saved[0])], source=source or e.action.source))
            if isinstance(e.action, Recompute) and str(e.saved[0]) in ways
            else e
            for e in plan.entries
        )
        return replace(plan, entries=tuple(entries))

    assert simulate_step(trace, with_ways({"2#0/0": ("1#0",), "3#0/0": ("2#0",)}), GPU).fits
    with pytest.raises(PlanMismatchError, match="takes the storage itself"):
        simulate_step(trace, with_ways({"2#0/0": ("1#0", "3#0"), "3#0/0": ("2#0",)}), GPU)
    with pytest.raises(PlanMismatchError, match="something else"):
        simulate_step(trace, with_ways({"2#0/0": ("1#0",)}, source="4#0/0"), GPU)
