"""Plans that mix every action at random: the same bits, and exactly the predicted memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vdnn
from tests.engine.steps import EVERYTHING, GPU, same, trained
from tests.engine.test_blocks import Net, measured
from vdnn.engine import VirtualDevice
from vdnn.errors import FormatError
from vdnn.policies import decide
from vdnn.values import Action, Keep, Plan, Recompute, Trace


def made() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(Net(2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 1), nn.GELU()), torch.randn(2, 3, 13, 12)


@cache
def known() -> tuple[Trace, dict[str, Plan], list[torch.Tensor]]:
    model, x = made()
    trace = vdnn.capture(model, x, device="cpu")
    policies = ("recompute-blocks", "recompute", "encode", "encode-offload", "vdnn-all")
    return trace, {name: decide(name, trace, GPU, EVERYTHING) for name in policies}, trained(model, x, 2)


@st.composite
def plans(draw: Any) -> Plan:
    """For each storage what one of the policies does with it; what may not be together is kept."""
    _, every, _ = known()
    names = list(every)
    actions: list[Action] = []
    for place in range(len(every["encode"].entries)):
        actions.append(every[draw(st.sampled_from(names))].entries[place].action)

    def plan() -> Plan:
        entries = (replace(e, action=a) for e, a in zip(every["encode"].entries, actions, strict=True))
        return replace(every["encode"], policy="mixed", entries=tuple(entries))

    for kind in ("", "chains", "again"):
        for place, action in enumerate(actions):
            if isinstance(action, Recompute) and (kind == "again" or (kind == "chains" and action.through)):
                actions[place] = Keep()
        try:
            plan().check()
        except FormatError:
            continue
        break
    return plan()


@settings(max_examples=12, deadline=None)
@given(plans(), st.integers(0, 9))
def test_any_mix_is_exact(plan: Plan, seed: int) -> None:
    trace, _, expected = known()
    model, x = made()
    device = VirtualDevice(seed=seed)
    vdnn.wrap(model, plan=plan, device=device)
    assert same(trained(model, x, 2), expected)
    assert not vdnn.report(model).mismatches
    assert measured(model, x, device) == vdnn.simulate(trace, plan, hardware="rtx4090").peak_requested_bytes
