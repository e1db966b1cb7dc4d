"""What the hooks cost the host, per saved tensor, beside bare no-op hooks and `save_on_cpu`, in one run.

    python experiments/bench_hooks.py [-o results/engine/hooks.json]

A chain of cheap ops on small tensors, forward and backward, on the CPU; each variant in turn, many rounds,
the median of the rounds. Copies on the virtual device are real memory copies of a few KiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

import vdnn
from vdnn.engine import Rule, Schedule, VirtualDevice, offloading, wrap_model

TENSORS, ROUNDS = 400, 41


def chain(x: torch.Tensor) -> torch.Tensor:
    """Each op saves one tensor."""
    for _ in range(TENSORS):
        x = x.sigmoid()
    return x


def seconds(context: Callable[[], AbstractContextManager[object]], x: torch.Tensor) -> float:
    begin = time.perf_counter()
    with context():
        y = chain(x)
    y.backward(torch.ones_like(y))
    return time.perf_counter() - begin


def per_tensor() -> dict[str, float]:
    """Microseconds a saved tensor above no hooks at all."""
    x = torch.randn(32, 32, requires_grad=True)
    # races are for tests to find; here only the engine's own cost counts
    device = VirtualDevice(check=False)
    variants: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "no hooks": nullcontext,
        "no-op hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        "save_on_cpu": torch.autograd.graph.save_on_cpu,
        "vdnn pass-through": lambda: offloading(device, Rule(offload=False)),
        "vdnn offloaded": lambda: offloading(device, Rule(min_bytes=1, max_inflight_bytes=0)),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, context in variants.items():
            times[name].append(seconds(context, x))
    bare = statistics.median(times["no hooks"])
    return {
        name: round((statistics.median(found) - bare) / TENSORS * 1e6, 2)
        for name, found in times.items()
        if name != "no hooks"
    }


def wrapped_ratio() -> float:
    """Time of a ResNet-50 step wrapped with nothing to offload, over the step unwrapped: median of pairs."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    plain, wrapped = resnet50(), resnet50()
    wrap_model(wrapped, VirtualDevice(check=False), lambda *a: Schedule(None, Rule(offload=False)))
    x = torch.randn(4, 3, 128, 128)

    def step(model: nn.Module) -> float:
        begin = time.perf_counter()
        model(x).sum().backward()
        return time.perf_counter() - begin

    for model in (plain, wrapped):
        step(model)
    return round(statistics.median(step(wrapped) / step(plain) for _ in range(15)), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cost = per_tensor()
    found = {"microseconds_per_saved_tensor": cost, "resnet50_wrapped_over_plain": wrapped_ratio()}
    for name, micros in cost.items():
        print(f"{name:20} {micros:8.2f} µs a saved tensor")
    print(f"{'ResNet-50, wrapped':20} {found['resnet50_wrapped_over_plain']:8.4f} x the time unwrapped")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "command": "experiments/bench_hooks.py",
            "vdnn": vdnn.__version__,
            "torch": torch.__version__,
            **found,
        }
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
        print(f"Wrote {arguments.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
