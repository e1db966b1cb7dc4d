"""What an experiment runs besides its cases: the paper's networks, and sweeps over the link's bandwidth.

results/<name>/runs/paper-<network>.json       vdnn.reproduction.numbers
                    paper-stalls.json.gz       one simulated step with its timeline, for the stall diagram
                    link-<model>-….json        slowdowns by GPU and bandwidth
                    node-<model>-….json        steps by GPU, policy and GPUs on a link
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vdnn import api, trace_cache
from vdnn.analysis.encoding import planned
from vdnn.analysis.moments import resolve
from vdnn.costs import op_times
from vdnn.errors import CaptureError, UsageError
from vdnn.experiment.cpu import Cpu, CpuModel, files_of, machine_file, measure_machine, run_model
from vdnn.experiment.frontier import Frontier, frontier_of
from vdnn.experiment.spec import Experiment, NodeSweep, Sweep
from vdnn.experiment.study import Model
from vdnn.policies import model_options
from vdnn.reporting import provenance
from vdnn.reproduction import NETWORKS, numbers_of
from vdnn.reproduction.numbers import MACHINE
from vdnn.sim.run import run
from vdnn.values import Trace, hardware, save

__all__ = ["Extra", "extras_of", "frontier_file", "node_file", "sweep_file"]

STALLS = ("VGG-16(64)", "vdnn-all-p")  # what Fig. 9 is drawn of


@dataclass(frozen=True, slots=True)
class Extra:
    """One piece of work that ends in one file."""

    name: str
    path: Path
    run: Callable[[Callable[[str], None]], None]


def extras_of(experiment: Experiment, folder: Path) -> list[Extra]:
    """Everything besides the cases, in order."""
    found = []
    for name in experiment.networks:
        path = folder / "runs" / f"paper-{name.replace('(', '-').rstrip(')').lower()}.json"
        found.append(Extra(name, path, _network(name, path)))
    for sweep in experiment.sweeps:
        for model in sweep.models:
            for precision in sweep.precisions:
                path = sweep_file(folder, model[0], model[1], precision)
                found.append(Extra(f"{model[0]} {precision}", path, _sweep(sweep, model, precision, path)))
    for frontier in experiment.frontiers:
        for model in frontier.models:
            for gpu in frontier.gpus:
                path = frontier_file(folder, frontier, model[0], model[1], gpu)
                found.append(Extra(f"{model[0]} on {gpu}", path, _frontier(frontier, model, gpu, path)))
    for nodes in experiment.nodes:
        for model in nodes.models:
            for gpu in nodes.gpus:
                path = node_file(folder, nodes, model[0], model[1], gpu)
                found.append(Extra(f"{model[0]} in a node of {gpu}", path, _node(nodes, model, gpu, path)))
    if experiment.cpu is not None:
        found += _on_cpu(experiment.cpu, folder)
    return found


def _on_cpu(cpu: Cpu, folder: Path) -> list[Extra]:
    found = [Extra("measure this CPU", machine_file(folder), lambda tell: measure_machine(cpu, folder))]
    for model in cpu.models:

        def work(tell: Callable[[str], None], model: CpuModel = model) -> None:
            tell(f"train {model.name}, batch {model.batch}, on this CPU")
            run_model(cpu, model, folder)

        found.append(Extra(f"{model.name} on this CPU", files_of(folder, model)[0], work))
    return found


def node_file(folder: Path, nodes: NodeSweep, model: str, batch: int, gpu: str) -> Path:
    """Where the steps of one model on one kind of GPU are."""
    return folder / "runs" / f"node-{model.replace(':', '-')}-{batch}-{nodes.ranks}x{gpu}-{nodes.precision}.json"


def frontier_file(folder: Path, frontier: Frontier, model: str, batch: int, gpu: str) -> Path:
    """Where the plans of one model on one GPU are."""
    return folder / "runs" / f"frontier-{model.replace(':', '-')}-{batch}-{gpu}-{frontier.precision}.json"


def sweep_file(folder: Path, model: str, batch: int, precision: str) -> Path:
    """Where the slowdowns of one model are."""
    return folder / "runs" / f"link-{model.replace(':', '-')}-{batch}-{precision}.json"


def _trace(model: str, batch: int, options: dict[str, Any], precision: str, optimizer: str) -> Trace:
    key = trace_cache.key_of(model, str(batch), options, precision, optimizer, "cuda")
    trace = trace_cache.known(key)
    if trace is None:
        trace = api.capture(api.load(model, batch, **options), precision=precision, optimizer=optimizer)
        trace_cache.keep(key, trace)
    return trace


def _keep(path: Path, data: dict[str, Any]) -> None:
    """Write a file whole or not at all: it is the sign that the work is done."""
    origin = provenance()
    made = {"command": origin.command, "commit": origin.commit, "vdnn": origin.vdnn, "source": "simulated"}
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"provenance": made, **data}, indent=1) + "\n")
    part.replace(path)


def _frontier(frontier: Frontier, model: Model, gpu: str, path: Path) -> Callable[[Callable[[str], None]], None]:
    def work(progress: Callable[[str], None]) -> None:
        name, batch, options = model
        progress(f"capture {name}")
        trace = _trace(name, batch, dict(options), frontier.precision, frontier.optimizer)
        try:
            again = {**dict(options), **model_options("checkpoint")}
            blocks: Trace | None = _trace(name, batch, again, frontier.precision, frontier.optimizer)
        except (UsageError, CaptureError):
            blocks = None  # no repeated blocks, or some that change what they get, as DenseNet's do: a list of features
        numbers = frontier_of(
            trace,
            blocks,
            hardware(gpu),
            frontier.percents,
            frontier.policies,
            lambda what: progress(f"{name} {gpu} {what}"),
        )
        _keep(path, {"model": name, "batch": batch, "precision": frontier.precision, "gpu": gpu, **numbers})

    return work


def _network(name: str, path: Path) -> Callable[[Callable[[str], None]], None]:
    def work(progress: Callable[[str], None]) -> None:
        model, batch = NETWORKS[name]
        progress(f"capture {name}")
        trace = _trace(model, batch, {}, "fp32", "none")
        numbers = numbers_of(trace, lambda policy: progress(f"{name} {policy}"))
        if name == STALLS[0]:
            plan = api.plan(trace, MACHINE, STALLS[1], regime="paper")
            result = api.simulate(trace, plan, MACHINE, timeline=True, regime="paper")
            save(result, path.with_name("paper-stalls.json.gz"))
        _keep(path, {"network": name, **numbers})

    return work


def _sweep(sweep: Sweep, model: Model, precision: str, path: Path) -> Callable[[Callable[[str], None]], None]:
    def work(progress: Callable[[str], None]) -> None:
        name, batch, options = model
        progress(f"capture {name} {precision}")
        trace = _trace(name, batch, dict(options), precision, sweep.optimizer)
        gpus: dict[str, Any] = {}
        for gpu in sweep.gpus:
            progress(f"{name} {precision} on {gpu}")
            machine = hardware(gpu)
            plan = api.plan(trace, gpu, sweep.policy)  # one plan for every bandwidth: the same bytes
            free = run(trace, (), op_times(trace, machine), machine).total_ns
            step = planned(trace, plan)
            moves, times = resolve(plan, step), op_times(step, machine)
            slowdowns = []
            for link in sweep.links:
                rate = int(link * 1e9)
                both = 2 * rate * machine.duplex_bytes_per_s // (machine.d2h_bytes_per_s + machine.h2d_bytes_per_s)
                other = replace(machine, d2h_bytes_per_s=rate, h2d_bytes_per_s=rate, duplex_bytes_per_s=both)
                slowdowns.append([link, run(step, moves, times, other).total_ns / free])
            here = api.simulate(trace, plan, gpu)
            base = api.simulate(trace, None, gpu)
            gpus[gpu] = {
                "slowdowns": slowdowns,
                "own_link_gb_per_s": machine.d2h_bytes_per_s / 1e9,
                "own_slowdown": (here.iteration_time_ns or 0) / free,
                "iteration_ms": free / 1e6,
                "offloaded_gib": (here.offloaded_bytes or 0) / 2**30,
                "peak_gib": (here.peak_requested_bytes or 0) / 2**30,
                "baseline_peak_gib": (base.peak_requested_bytes or 0) / 2**30,
                "fits": here.fits,
                "baseline_fits": base.fits,
            }
        _keep(path, {"model": name, "batch": batch, "precision": precision, "policy": sweep.policy, "gpus": gpus})

    return work


def _node(nodes: NodeSweep, model: Model, gpu: str, path: Path) -> Callable[[Callable[[str], None]], None]:
    def work(progress: Callable[[str], None]) -> None:
        name, batch, options = model
        alone_ns = 0
        policies: dict[str, Any] = {}
        for policy in dict.fromkeys(["none", *nodes.policies]):
            progress(f"{name} {policy} in a node of {gpu}")
            trace = _trace(name, batch, {**dict(options), **model_options(policy)}, nodes.precision, nodes.optimizer)
            alone_ns = alone_ns or api.simulate(trace, None, gpu).iteration_time_ns or 0
            steps = []
            for count in nodes.per_link:
                node = nodes.node(count)
                step = api.simulate(trace, api.plan(trace, gpu, policy, node=node), gpu, node=node)
                pinned = nodes.ranks * (step.host_peak_bytes or 0)
                steps.append(
                    {
                        "gpus_per_link": count,
                        "iteration_ns": step.iteration_time_ns,
                        "slowdown": (step.iteration_time_ns or 0) / alone_ns,
                        "stall_ns": step.stall_ns,
                        "peak_requested_bytes": step.peak_requested_bytes,
                        "pinned_bytes": pinned,
                        "fits": step.fits,
                        "notes": [note for note in step.notes if "GPUs" in note],
                    }
                )
            policies[policy] = steps
        heading = {"model": name, "batch": batch, "precision": nodes.precision, "gpu": gpu, "gpus": nodes.ranks}
        _keep(path, {**heading, "host_memory": nodes.host_memory, "alone_ns": alone_ns, "policies": policies})

    return work
