"""What the hooks cost the host, per saved tensor, beside bare no-op hooks and `save_on_cpu`, in one run.

    python experiments/bench_hooks.py [-o results/engine/hooks.json]

A chain of cheap ops on small tensors, forward and backward, on the CPU; each variant in turn, many rounds;
CPU time of the thread, of the fastest round (the others shared the machine). What is moved is moved on a device
that issues nothing: buffers and host blocks are real, streams and events are stand-ins, and no byte is copied,
so what is left is the engine's own work. On the virtual device the same work is ordered, checked and really
copied; that is what tests cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vdnn
from vdnn.engine import Offloader, Rule, Schedule, VirtualDevice, offloading, wrap_model
from vdnn.engine.arena import Arena
from vdnn.engine.device import Buffer, Form, HostBlock, HostUse, over
from vdnn.engine.hostpool import HostPool
from vdnn.values import Entry, Offload, Plan, SavedName
from vdnn.values.plan import OUTSIDE

TENSORS, ROUNDS = 400, 61


class BareDevice:
    """A device whose every call returns at once: what the engine does between them is all that takes time."""

    name = "bare"
    alignment = 64
    offload_stream, prefetch_stream, compute_stream = "offload", "prefetch", "compute"

    def __init__(self) -> None:
        self.pool = HostPool(None)
        self.copies = 0

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cpu

    def current_stream(self) -> str:
        return self.compute_stream

    def record(self, stream: str) -> str:
        return stream

    def wait(self, stream: str, event: str) -> None:
        pass

    def adopt(
        self, tensor: torch.Tensor, first: int, nbytes: int, stream: str | None = None, form: Form | None = None
    ) -> Buffer:
        return over(tensor, first, nbytes, stream or self.compute_stream, form)

    def allocate(
        self, nbytes: int, stream: str | None = None, form: Form | None = None, like: torch.Tensor | None = None
    ) -> Buffer:
        if form is None or like is None:
            data = torch.empty(nbytes, dtype=torch.uint8)
        else:
            data = like.new_empty_strided(form.shape, form.stride)
        return Buffer(data, stream or self.compute_stream, form)

    def copy_out(self, block: HostBlock, buffer: Buffer) -> None:
        block.view(buffer.form)  # what the copy would write to
        self.copies += 1

    def copy_back(self, buffer: Buffer, block: HostBlock, at: int) -> None:
        block.view(buffer.form)
        self.copies += 1

    def use(self, buffer: Buffer, stream: str | None = None) -> torch.Tensor:
        assert buffer.data is not None
        return buffer.data

    def drop(self, buffer: Buffer, reader: object = None) -> None:
        buffer.data = None

    def host_block(self, nbytes: int) -> HostBlock | None:
        return self.pool.take(nbytes)

    def give_back(self, block: HostBlock, busy: object) -> None:
        self.pool.give_back(block, busy)

    def host_arena(self) -> Arena:
        return Arena(self.pool)

    def host_bytes(self) -> HostUse:
        return self.pool.sizes()


def chain(x: torch.Tensor) -> torch.Tensor:
    """Each op saves one tensor."""
    for _ in range(TENSORS):
        x = x.sigmoid()
    return x


def seconds(context: Callable[[], AbstractContextManager[object]], x: torch.Tensor) -> float:
    gradient = torch.ones_like(x)
    begin = time.thread_time()  # backward on the CPU runs in this thread, too
    with context():
        y = chain(x)
    y.backward(gradient)
    return time.thread_time() - begin


def planned(moved: range, nbytes: int) -> Schedule:
    """A plan that moves some tensors of the chain: each back in time for the one before it."""
    names = [SavedName(OUTSIDE, 0, n, "float32", 2, nbytes) for n in moved]
    entries = tuple(
        Entry((name,), nbytes, Offload(f"pack {name}", f"unpack {OUTSIDE}#0/{min(name.index + 1, TENSORS - 1)}"))
        for name in names
    )
    return Schedule(Plan("by hand", "chain", 1, "cpu", "", None, entries))


@contextmanager
def by_plan(offloader: Offloader, schedule: Schedule) -> Any:
    """One step of a model that stays wrapped: its offloader and its host memory are those of the step before."""
    with ExitStack() as stack:
        offloader.begin(schedule, set())
        stack.callback(offloader.end)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(offloader.pack, offloader.unpack))
        yield offloader


def per_tensor() -> dict[str, float]:
    """Microseconds a saved tensor above no hooks at all."""
    x = torch.randn(32, 32, requires_grad=True)
    bare, virtual = BareDevice(), VirtualDevice(check=False)
    few, many = Offloader(bare), Offloader(bare)
    one, every = planned(range(1), x.nbytes), planned(range(TENSORS), x.nbytes)
    by_rule = Rule(min_bytes=1, max_inflight_bytes=0)
    variants: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "no hooks": nullcontext,
        "no-op hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        "save_on_cpu": torch.autograd.graph.save_on_cpu,
        "vdnn, nothing to move": lambda: offloading(bare, Rule(offload=False)),
        "vdnn, kept by plan": lambda: by_plan(few, one),
        "vdnn, kept by rule": lambda: offloading(bare, Rule()),
        "vdnn, moved by plan": lambda: by_plan(many, every),
        "vdnn, moved by rule": lambda: offloading(bare, by_rule),
        "the same, virtual device": lambda: offloading(virtual, by_rule),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, context in variants.items():
            times[name].append(seconds(context, x))
    assert bare.copies == 2 * ROUNDS * (1 + 2 * TENSORS), "the moved variants did not move every tensor"
    plain = min(times["no hooks"])
    return {name: round((min(found) - plain) / TENSORS * 1e6, 2) for name, found in times.items() if name != "no hooks"}


def wrapped_ratio() -> float:
    """CPU time of a ResNet-50 step wrapped with nothing to offload, over the step unwrapped: median of pairs."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    plain, wrapped = resnet50(), resnet50()
    wrap_model(wrapped, VirtualDevice(check=False), lambda *a: Schedule(None, Rule(offload=False)))
    x = torch.randn(4, 3, 128, 128)

    def step(model: nn.Module) -> float:
        begin = time.process_time()  # of one thread: others that share the machine do not count
        model(x).sum().backward()
        return time.process_time() - begin

    for model in (plain, wrapped):
        step(model)
    # in turn the one and the other first: neither always finds the caches warm
    pairs = [(step(wrapped), step(plain)) if n % 2 else (step(plain), step(wrapped))[::-1] for n in range(24)]
    return round(statistics.median(ours / theirs for ours, theirs in pairs), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cost = per_tensor()
    found = {"microseconds_per_saved_tensor": cost, "resnet50_wrapped_over_plain": wrapped_ratio()}
    for name, micros in cost.items():
        print(f"{name:26} {micros:8.2f} µs a saved tensor")
    print(f"{'ResNet-50, nothing to move':26} {found['resnet50_wrapped_over_plain']:8.4f} x the time unwrapped")
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
