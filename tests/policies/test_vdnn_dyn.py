"""`vdnn-dyn` takes the paper's passes in the paper's order, and says why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vdnn.analysis.convolutions import offers_of, with_workspaces
from vdnn.analysis.liveness import requested
from vdnn.analysis.moments import resolve
from vdnn.analysis.synthetic import conv_chain, transformer_chain
from vdnn.analysis.torch7 import under
from vdnn.errors import InfeasibleError
from vdnn.policies import Options, decide
from vdnn.policies.vdnn_dyn import decide_dyn
from vdnn.values import Plan, Trace, hardware

TITAN = hardware("titan-x")
PAPER = Options(regime="paper")
# Wide enough that FFT is the fastest for the deeper layers, so that (p) needs a workspace.
NET = conv_chain(channels=(64, 64, 256, 256, 512, 512), batch=64, size=56)


def live(plan: Plan, trace: Trace = NET) -> int:
    """The most bytes that live under a plan, with the workspaces of its algorithms."""
    step = under("paper", trace, "vdnn")
    step = with_workspaces(step, offers_of(plan, step, TITAN.peak("float32")))
    return max(requested(step, resolve(plan, step)))


def dyn(budget: int) -> Plan:
    return decide("vdnn-dyn", NET, TITAN, replace(PAPER, budget_bytes=budget))


def needs() -> dict[str, int]:
    """What each candidate needs: none(p) is vDNN's allocation without offload."""
    step = under("paper", NET, "vdnn")
    found = {f"{p}-{a}": live(decide(f"vdnn-{p}-{a}", NET, TITAN, PAPER)) for p in ("conv", "all") for a in "mp"}
    found["none-p"] = live(decide("none-p", step, TITAN, PAPER))
    return found


def test_with_all_the_memory_nothing_is_offloaded_and_the_fastest_algorithms_run() -> None:
    plan = dyn(TITAN.memory_bytes)
    assert plan.notes[0] == "vdnn-dyn chose none(p)"
    assert plan.offloaded_bytes == 0
    assert plan.workspace == "fastest"


def test_as_memory_shrinks_the_passes_come_in_the_paper_s_order() -> None:
    budget, met = live(dyn(TITAN.memory_bytes)), []
    while True:
        try:
            plan = dyn(budget)
        except InfeasibleError:
            break
        assert live(plan) <= budget, "what is adopted fits"
        met.append(plan.notes[0].removeprefix("vdnn-dyn chose "))
        budget -= budget // 50
    assert list(dict.fromkeys(met)) == ["none(p)", "conv(p)", "all(p)", "greedy conv", "greedy all"]
    assert met == sorted(met, key=met.index), "no pass comes back once memory is too small for it"


def test_each_pass_is_adopted_from_exactly_what_it_needs() -> None:
    required = needs()
    names = {"none-p": "none(p)", "conv-p": "conv(p)", "all-p": "all(p)"}
    assert required["none-p"] > required["conv-p"] > required["all-p"] > required["conv-m"] > required["all-m"]
    for key, name in names.items():
        assert dyn(required[key]).notes[0] == f"vdnn-dyn chose {name}"
        assert dyn(required[key] - 1).notes[0] != f"vdnn-dyn chose {name}"


def test_greedy_downgrades_only_what_overflows_and_the_log_names_it() -> None:
    budget = live(decide("vdnn-conv-m", NET, TITAN, PAPER))
    plan = dyn(budget)
    assert plan.notes[0] == "vdnn-dyn chose greedy conv"
    assert plan.workspace == "mixed"
    fastest = decide("vdnn-conv-p", NET, TITAN, PAPER)
    slower = [
        (mine.module, mine, theirs)
        for mine, theirs in zip(plan.convolutions, fastest.convolutions, strict=True)
        if mine != theirs
    ]
    assert slower
    assert len(slower) < len(plan.convolutions), "not every layer overflows"
    log = "\n".join(plan.notes)
    for module, _, _ in slower:
        assert f"layer {module}" in log
    assert "downgraded from" in log
    assert " over" in log
    assert live(plan) <= budget


def test_what_cannot_be_trained_is_said_with_what_it_takes() -> None:
    least = live(decide("vdnn-all-m", NET, TITAN, PAPER))
    assert dyn(least)
    with pytest.raises(InfeasibleError, match="even with everything offloaded it needs"):
        dyn(least - 1)


def test_the_log_has_every_pass_with_its_numbers() -> None:
    step = decide_dyn(under("paper", NET, "vdnn"), TITAN, replace(PAPER, rules="paper", min_bytes=0))
    assert step.log[0].startswith("pass 1: all(m) needs")
    assert step.log[1].startswith("pass 2: none(p) needs")
    assert step.log[-1] == "adopted: none(p)"


def test_without_a_table_the_passes_differ_in_what_they_offload() -> None:
    trace = conv_chain(batch=64)
    everything = max(requested(trace))
    options = Options(min_bytes=0, keep_soon=False)
    free = decide("vdnn-dyn", trace, TITAN, replace(options, budget_bytes=everything))
    assert free.notes[0] == "vdnn-dyn chose none(p)"
    tight = decide("vdnn-dyn", trace, TITAN, replace(options, budget_bytes=everything * 9 // 10))
    assert tight.offloaded_bytes > 0
    assert any("no table of convolution algorithms" in note for note in tight.notes)


def test_a_transformer_is_decided_for_too() -> None:
    plan = decide("vdnn-dyn", transformer_chain(), TITAN)
    assert plan.notes[0] == "vdnn-dyn chose none(p)"
