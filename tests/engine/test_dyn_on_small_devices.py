"""`vdnn-dyn` under the engine: as a virtual device's memory shrinks it picks another pass, and gradients stay exact."""

from __future__ import annotations

import pytest
import torch

import vdnn
from vdnn.engine import engine_of
from vdnn.errors import InfeasibleError
from vdnn.models import load
from vdnn.tracing import capture_work
from vdnn.values import hardware

OPTIONS = {"rules": "paper", "min_bytes": 0, "keep_soon": False}
WORK = load("paper:googlenet", 16, width=0.0625, image_size=64)


def step(memory: int | None) -> tuple[list[torch.Tensor], str, int]:
    """One training step on a device of that memory: gradients, the pass that was chosen, bytes offloaded."""
    torch.manual_seed(0)
    model = WORK.build()
    args, kwargs = WORK.inputs("cpu")
    device = vdnn.VirtualDevice(memory=memory, seed=1)
    if memory is not None:
        vdnn.wrap(model, policy="vdnn-dyn", device=device, optimizer="none", **OPTIONS)
    with device:
        WORK.loss(model(*args, **kwargs), WORK.targets("cpu")).backward()
    chosen, offloaded = "", 0
    if memory is not None:
        report = engine_of(model).report()
        chosen = next(note for note in report.notes if note.startswith("vdnn-dyn chose")).split()[-1]
        offloaded = report.offloaded_bytes
        device.finish()
        vdnn.unwrap(model)
    return [p.grad for p in model.parameters()], chosen, offloaded


def test_dyn_picks_differently_as_the_device_shrinks_and_moves_what_the_simulator_says() -> None:
    expected, _, _ = step(None)
    trace = capture_work(WORK, device="cpu")
    machine = hardware("titan-x")
    peaks = {
        policy: vdnn.simulate(trace, vdnn.plan(trace, machine, policy, **OPTIONS), machine).peak_requested_bytes
        for policy in ("none", "vdnn-conv", "vdnn-all")
    }
    assert peaks["none"] > peaks["vdnn-conv"] > peaks["vdnn-all"]
    met = {}
    for policy, chosen in (("none", "none(p)"), ("vdnn-conv", "conv(p)"), ("vdnn-all", "all(p)")):
        memory = peaks[policy] + 8192  # the loss's few bytes outside of the model may differ
        gradients, found, offloaded = step(memory)
        assert found == chosen
        plan = vdnn.plan(trace, machine, policy, **OPTIONS)
        assert offloaded == vdnn.simulate(trace, plan, machine).offloaded_bytes, "to the byte"
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True)), found
        met[found] = offloaded
    assert met["none(p)"] == 0 < met["conv(p)"] < met["all(p)"]
    with pytest.raises(InfeasibleError, match="has no plan with which"):
        step(peaks["vdnn-all"] // 2)
