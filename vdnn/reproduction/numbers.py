"""One network's numbers under every policy of the paper, on the paper's machine; plain data, as a run file holds it.

memory      Fig. 1, 4, 11, 15: requested bytes; the average is over the layers' steps, forward and backward
traffic     Fig. 12: what offloads
time        Fig. 14: the feature extraction layers
layers      Fig. 5, 6, 13: one row a CONV layer
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from vdnn.analysis.convolutions import offers_of, with_workspaces
from vdnn.analysis.liveness import largest_working_set, requested
from vdnn.analysis.moments import resolve
from vdnn.analysis.torch7 import under
from vdnn.costs import times_with
from vdnn.policies import Options, decide
from vdnn.reproduction.networks import POLICIES
from vdnn.sim import simulate_step
from vdnn.values import Hardware, Plan, Trace, hardware

__all__ = ["MACHINE", "numbers_of"]

MACHINE = "titan-x"
MIB = 2**20


def numbers_of(trace: Trace, progress: Callable[[str], None] = lambda policy: None) -> dict[str, Any]:
    """Everything that the figures show of one network."""
    gpu = hardware(MACHINE)
    found: dict[str, Any] = {"policies": {}}
    for label, policy in POLICIES.items():
        progress(policy)
        plan = decide(policy, trace, gpu, Options(regime="paper"))
        found["policies"][label] = _policy(trace, plan, gpu)
        if label == "dyn":
            found["dyn"] = plan.notes[0].removeprefix("vdnn-dyn chose ")
            found["dyn_log"] = [note for note in plan.notes if note.startswith(("pass", "adopted"))]
        if label == "base(p)":
            found["memory"] = _categories(trace, plan, gpu)
            found["layers"] = _layers(trace, plan, gpu)
    return found


def _step(trace: Trace, plan: Plan, gpu: Hardware) -> Trace:
    """The step that a plan runs on the paper's machine, with its workspaces."""
    step = under("paper", trace, plan.policy)
    return with_workspaces(step, offers_of(plan, step, gpu.peak("float32")))


def _policy(trace: Trace, plan: Plan, gpu: Hardware) -> dict[str, Any]:
    result = simulate_step(trace, plan, gpu, regime="paper")
    step = _step(trace, plan, gpu)
    live = requested(step, resolve(plan, step))
    most: dict[tuple[int, str], int] = {}  # of each layer's step; the two gradients of a CONV layer are one
    for op, nbytes in zip(step.ops, live, strict=True):
        most[op.module, op.phase] = max(most.get((op.module, op.phase), 0), nbytes)
    network_wide = plan.policy.startswith("none")  # what is allocated once is in use all the time
    average = max(live) if network_wide else sum(most.values()) / len(most)
    return {
        "max_mib": max(live) / MIB,
        "avg_mib": average / MIB,
        "time_ms": (result.iteration_time_ns or 0) / 1e6,
        "stall_ms": (result.stall_ns or 0) / 1e6,
        "offloaded_mib": (result.offloaded_bytes or 0) / MIB,
        "host_mib": (result.host_peak_bytes or 0) / MIB,
        "fits": result.fits,
        "peak_at": result.peak_at,
        "pool": result.notes[-1],
    }


def _categories(trace: Trace, plan: Plan, gpu: Hardware) -> dict[str, float]:
    step = _step(trace, plan, gpu)
    sums: Counter[str] = Counter()
    for s in step.storages:
        sums[s.category] += s.nbytes
    workspace = max(op.workspace_bytes for op in step.ops)
    total = max(requested(step))
    layers = under("paper", trace, "vdnn")
    layerwise = with_workspaces(layers, offers_of(plan, layers, gpu.peak("float32")))
    return {
        "weights_mib": (sums["parameter"] + sums["buffer"]) / MIB,
        "feature_maps_mib": (sums["input"] + sums["activation"]) / MIB,
        "gradient_maps_mib": sums["gradient"] / MIB,
        "workspace_mib": workspace / MIB,
        "total_mib": total / MIB,
        "largest_layer_percent": 100 * largest_working_set(layerwise) / total,
    }


def _layers(trace: Trace, plan: Plan, gpu: Hardware) -> list[dict[str, Any]]:
    """One row a CONV layer: sizes, algorithm, times, reuse distance of its X, and DRAM traffic."""
    step = under("paper", trace, "vdnn")
    chosen = offers_of(plan, step, gpu.peak("float32"))
    times = times_with(step, gpu, chosen, plan.algorithm_table)
    clock = list(accumulate(times, initial=0))
    rows: list[dict[str, Any]] = []
    for number, call in enumerate(step.modules):
        if call.kind != "conv":
            continue
        ops = [i for i, op in enumerate(step.ops) if op.module == number]
        forward, backward = ops[0], ops[1:]
        x = next(t.storage for t in step.saved if t.module == number)
        y = step.ops[forward].writes[0]
        weights = [i for i in step.ops[forward].reads if step.storages[i].category == "parameter"]
        moved = [step.ops[i].read_bytes + step.ops[i].written_bytes for i in ops]
        back_ns = sum(times[i] for i in backward)
        rows.append(
            {
                "layer": f"C{len(rows) + 1}",
                "fqn": call.fqn,
                "algorithm": chosen[forward].algorithm,
                "backward_algorithm": chosen[backward[0]].algorithm,
                "maps_mib": (step.storages[x].nbytes + step.storages[y].nbytes) / MIB,
                "workspace_mib": chosen[forward].workspace_bytes / MIB,
                "weights_mib": sum(step.storages[i].nbytes for i in weights) / MIB,
                "forward_ms": times[forward] / 1e6,
                "backward_ms": back_ns / 1e6,
                "reuse_ms": (clock[backward[0]] - clock[forward + 1]) / 1e6,
                "forward_gb_per_s": moved[0] / times[forward],
                "backward_gb_per_s": sum(moved[1:]) / back_ns,
            }
        )
    return rows
