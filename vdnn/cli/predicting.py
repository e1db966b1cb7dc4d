"""`capture`, `plan`, `simulate`, `compare`: what needs no GPU."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vdnn import api
from vdnn.choosing import BUDGET, must_be_policy
from vdnn.cli.arguments import (
    DRAWN,
    Algorithms,
    Batch,
    Budget,
    Figure,
    Force,
    Gpu,
    Gpus,
    GpusPerLink,
    HostMemory,
    Json,
    Model,
    ModelName,
    ModelOptions,
    NoCache,
    Optimizer,
    Output,
    Policies,
    Policy,
    Precision,
    RecipeParts,
    Regime,
    Rules,
    TraceDevice,
    busy,
    model_options,
    must_be_free,
    must_be_one,
    node_of,
    show,
    show_results,
    trace_of,
    typed,
    write_value,
)
from vdnn.cli.beside import measured_pairs, show_pairs
from vdnn.errors import InfeasibleError, UsageError
from vdnn.values import Plan, RunResult, Trace, hardware
from vdnn.values import load as load_value

__all__ = ["capture", "compare", "max_batch", "plan", "simulate"]

# Policies whose largest batch is looked for if none is named; each takes some captures.
_LARGEST = ("none", "vdnn-conv", "vdnn-all", "checkpoint", BUDGET)

BAND = 0.1  # of the figure of measured results: what is wished of a prediction of time


def capture(
    model: ModelName,
    output: Annotated[Path, typer.Option("-o", "--output", help="The trace's file: NAME.json or NAME.json.gz.")],
    batch: Batch = "32",
    precision: Precision = "fp32",
    optimizer: Optimizer = "none",
    device: TraceDevice = "cuda",
    options: ModelOptions = None,
    recipe: RecipeParts = None,
    no_cache: NoCache = False,
    force: Force = False,
) -> None:
    """Write one training step of a model down, without a GPU.

    Example: vdnn capture torchvision:resnet50 --batch 64 -o resnet50.json.gz
    """
    must_be_free(output, force)
    if model.endswith((".json", ".json.gz")):
        raise UsageError(f"{model} is a file, and a model is captured: name it like torchvision:resnet50")
    write_value(trace_of(model, batch, precision, optimizer, options, device, no_cache, parts=recipe), output)


def plan(
    context: typer.Context,
    model: Model,
    gpu: Gpu,
    policy: Policy = "",
    budget: Budget = "",
    batch: Batch = "32",
    precision: Precision = "fp32",
    optimizer: Optimizer = "none",
    rules: Rules = "event",
    regime: Regime = "pytorch",
    algorithms: Algorithms = "",
    device: TraceDevice = "cuda",
    options: ModelOptions = None,
    recipe: RecipeParts = None,
    no_cache: NoCache = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="By module: when it leaves, comes back, costs, and why.")
    ] = False,
    as_json: Json = False,
    output: Output = None,
    force: Force = False,
) -> None:
    """Decide for every saved storage, and say what was decided.

    Example: vdnn plan torchvision:resnet50 --batch 128 --gpu rtx4090 --precision amp --budget 4GiB --explain
    """
    from vdnn.reporting import as_rows, explained, explanation, plan_head, plan_report, plan_rows, result_rows

    must_be_free(output, force)
    must_be_one(policy=policy, budget=budget)
    hardware(gpu)
    wanted = (model, batch, precision, optimizer, options, device, no_cache)
    trace = trace_of(*wanted, policy, recipe, asked=typed(context))
    how: dict[str, Any] = {"rules": rules, "regime": regime, "algorithms": algorithms}
    made = api.plan(trace, gpu, policy, budget=budget or None, **how)
    if explain:
        result = api.simulate(trace, made, gpu, memory_limit=made.budget_bytes, timeline=True, regime=regime)
        rows: Any = explained(made, result)
        table = explanation(made, result)
    else:
        rows, table = plan_rows(made), plan_report(made)
    if as_json:
        numbers: dict[str, Any] = {}
        if explain:
            plain = trace_of(*wanted, parts=recipe)
            baseline = api.plan(plain, gpu, "none", **how)
            without = api.simulate(plain, baseline, gpu, memory_limit=made.budget_bytes, regime=regime)
            numbers = result_rows([result], without)[0]
        typer.echo(json.dumps({**plan_head(made), **numbers, "entries": as_rows(rows)}, indent=1))
    else:
        show(table, width=130 if explain else 100)
    write_value(made, output)


def simulate(
    context: typer.Context,
    model: Model,
    gpu: Gpu,
    policy: Policy = "",
    budget: Budget = "",
    plan_file: Annotated[Path | None, typer.Option("--plan", help="A plan's file, instead of a policy.")] = None,
    batch: Batch = "32",
    precision: Precision = "fp32",
    optimizer: Optimizer = "none",
    rules: Rules = "event",
    regime: Regime = "pytorch",
    algorithms: Algorithms = "",
    options: ModelOptions = None,
    recipe: RecipeParts = None,
    gpus: Gpus = 1,
    gpus_per_link: GpusPerLink = 1,
    host_memory: HostMemory = "",
    no_cache: NoCache = False,
    as_json: Json = False,
    perfetto: Annotated[Path | None, typer.Option(help="Write the streams as a Chrome trace: NAME.json.")] = None,
    memory_snapshot: Annotated[
        Path | None, typer.Option(help="Write what the allocator did for pytorch.org/memory_viz: NAME.pickle.")
    ] = None,
    output: Output = None,
    force: Force = False,
) -> None:
    """Predict memory and time of one training step on a GPU.

    Example: vdnn simulate torchvision:resnet50 --batch 256 --gpu rtx4090 --policy vdnn-all --json
    """
    must_be_free(output, force)
    must_be_free(perfetto, force)
    must_be_free(memory_snapshot, force, ())
    must_be_one(policy=policy, budget=budget, plan=plan_file, asked=typed(context))
    hardware(gpu)
    node = node_of(gpus, gpus_per_link, host_memory)
    made = load_value(plan_file, "plan") if plan_file is not None else None
    wanted = (model, batch, precision, optimizer, options, "cuda", no_cache)
    seen: dict[str, Trace] = {}
    plain = trace_of(*wanted, parts=recipe, seen=seen, asked=typed(context))
    trace = trace_of(*wanted, policy, recipe, seen)
    how: dict[str, Any] = {"rules": rules, "regime": regime, "algorithms": algorithms, "node": node}
    if made is None:
        made = api.plan(trace, gpu, policy or ("" if budget else "none"), budget=budget or None, **how)
    assert isinstance(made, Plan)
    limit = made.budget_bytes
    under: dict[str, Any] = {"memory_limit": limit, "regime": regime, "node": node}
    baseline = api.simulate(plain, api.plan(plain, gpu, "none", **how), gpu, **under)
    shown = bool(output or perfetto or memory_snapshot)
    same = made.policy == "none" and trace is plain and plan_file is None and not shown
    result = baseline if same else api.simulate(trace, made, gpu, timeline=shown, **under)
    if as_json:
        from vdnn.reporting import result_rows

        typer.echo(json.dumps(result_rows([result], baseline)[0], indent=1))
    else:
        show_results([baseline] if made.policy == "none" else [baseline, result], False)
    write_value(result, output)
    if perfetto is not None:
        from vdnn.reporting import write_perfetto

        typer.echo(f"Wrote {write_perfetto(result, perfetto)}", err=True)
    if memory_snapshot is not None:
        from vdnn.analysis.dataparallel import data_parallel
        from vdnn.analysis.encoding import planned
        from vdnn.analysis.moments import resolve
        from vdnn.sim.allocator_snapshot import step_snapshot
        from vdnn.sim.workspaces import allocatable_bytes, with_libraries
        from vdnn.snapshots import save_snapshot

        memory = limit or allocatable_bytes(trace, hardware(gpu))
        step, _ = data_parallel(planned(trace, made), node)
        moves = resolve(made, step)
        step = with_libraries(step, hardware(gpu))
        save_snapshot(step_snapshot(step, moves, memory, result.timeline), memory_snapshot)
        typer.echo(f"Wrote {memory_snapshot}", err=True)


def compare(
    context: typer.Context,
    model: Model = "",
    gpu: Gpu = "",
    policy: Policies = None,
    batch: Batch = "32",
    precision: Precision = "fp32",
    optimizer: Optimizer = "none",
    rules: Rules = "event",
    regime: Regime = "pytorch",
    algorithms: Algorithms = "",
    options: ModelOptions = None,
    recipe: RecipeParts = None,
    gpus: Gpus = 1,
    gpus_per_link: GpusPerLink = 1,
    host_memory: HostMemory = "",
    no_cache: NoCache = False,
    as_json: Json = False,
    measured: Annotated[
        list[Path] | None, typer.Option(help="Measured results beside the predictions: a file or a folder; again.")
    ] = None,
    figure: Figure = None,
    force: Force = False,
) -> None:
    """Predict one training step under several policies, from one capture; or hold measured results beside predictions.

    Example: vdnn compare --measured results/demo/runs --figure prediction.png
    Example: vdnn compare paper:vgg16 --batch 128 --gpu titan-x --regime paper --policies all --figure vgg16.png
    """
    from vdnn.policies import Options, distinct, names

    must_be_free(figure, force, DRAWN)
    if measured and not model:
        show_pairs(measured_pairs(measured), as_json, figure, BAND)
        return
    if not model or not gpu:
        raise UsageError("name a MODEL and its --gpu to compare policies, or give --measured results")
    how: dict[str, Any] = {"rules": rules, "regime": regime, "algorithms": algorithms}
    node = node_of(gpus, gpus_per_link, host_memory)
    wanted = (model, batch, precision, optimizer, options, "cuda", no_cache)
    chosen = None if policy in (None, ["all"]) else policy
    for name in chosen or ():
        must_be_policy(name)
    hardware(gpu)
    results: list[RunResult] = []
    seen: dict[str, Trace] = {}
    left_out = LeftOut(chosen)
    compared = ["none", *(name for name in chosen or distinct(names(), Options(**how)) if name != "none")]
    for name in compared:
        with left_out.unless_it_can_be(name):
            trace = trace_of(*wanted, name, recipe, seen, typed(context))
            made = api.plan(trace, gpu, name, node=node, **how)
            results.append(api.simulate(trace, made, gpu, regime=regime, node=node))
        if name == "none" and chosen is None and regime == "pytorch" and not results[0].fits:
            compared.append(BUDGET)  # where the step fits it is the same as none
    left_out.tell()
    if measured:
        show_pairs(measured_pairs(measured, results), as_json, figure, BAND)
        return
    show_results(results, as_json)
    if figure is not None:
        from vdnn.reporting.plots import policies_figure, save_figure

        typer.echo(f"Wrote {save_figure(policies_figure(results), figure)}", err=True)


def max_batch(
    model: ModelName,
    gpu: Gpu,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", "--policies", help=f"A policy; again for another; all. Default: {', '.join(_LARGEST)}."
        ),
    ] = None,
    memory: Annotated[str, typer.Option(help="Device memory, 12GiB, instead of the GPU's.")] = "",
    precision: Precision = "fp32",
    optimizer: Optimizer = "sgd",
    rules: Rules = "event",
    options: ModelOptions = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Find the largest batch that fits under each policy, and what a sample then takes.

    Under "budget" it is the largest that the planner makes fit.

    Example: vdnn max-batch torchvision:resnet50 --gpu rtx4090 --precision amp
    """
    from vdnn.batches import fitting
    from vdnn.policies import Options, distinct, names
    from vdnn.reporting import batches_table, result_rows

    chosen = None if policy in (None, ["all"]) else policy
    for name in chosen or ():
        must_be_policy(name)
    every = (*distinct(names(), Options()), BUDGET) if policy == ["all"] else _LARGEST
    hardware(gpu)
    if model.endswith((".json", ".json.gz")):
        raise UsageError(f"{model} is a trace of one batch: name the model, it is captured at several")
    results: list[RunResult] = []
    traces: dict[Any, Trace] = {}
    left_out = LeftOut(chosen)
    for name in sorted(chosen or every, key=lambda name: name != "none"):
        search = f"looking for the largest batch of {model} under {name}"
        with left_out.unless_it_can_be(name), busy(search, told=True):
            best, _ = api.max_batch(
                model, gpu, name, memory=memory or None, precision=precision, optimizer=optimizer,
                model_options=model_options(options), traces=traces, cached=not no_cache,
                start=fitting(name, {result.policy: result.batch for result in results}), rules=rules,
            )  # fmt: skip
            results.append(best)
    left_out.tell()
    if not results:
        raise InfeasibleError(f"under no policy does {model} fit on {gpu}: take a larger GPU, or a smaller model")
    if as_json:
        typer.echo(json.dumps(result_rows(results), indent=1))
    else:
        show(batches_table(results))


class LeftOut:
    """Policies that cannot be compared, by why: one line for each reason.

    It is an error where they were named, but for several of which some fit: that one does not is an answer.
    """

    def __init__(self, named: list[str] | None) -> None:
        self.named = named
        self.why: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def unless_it_can_be(self, name: str) -> Iterator[None]:
        """What is tried for a policy; a model that cannot be loaded at all fails under "none" already."""
        try:
            yield
        except (UsageError, InfeasibleError) as error:
            named = self.named is not None and (isinstance(error, UsageError) or len(self.named) == 1)
            if named or (name == "none" and isinstance(error, UsageError)):
                raise
            self.why.setdefault(str(error), []).append(name)

    def tell(self) -> None:
        """Say on stderr what was left out."""
        for why, names in self.why.items():
            typer.echo(f"vdnn: left out {', '.join(names)}: {why}", err=True)
