"""What the commands share: their arguments, reading and writing of values, and what shows that they are busy."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vdnn import api, trace_cache
from vdnn.choosing import BUDGET, must_be_policy
from vdnn.cli.starting import importing
from vdnn.errors import UsageError
from vdnn.values import Node, Recipe, RunResult, Trace
from vdnn.values import load as load_value
from vdnn.values import save as save_value

__all__ = [
    "DRAWN",
    "Algorithms",
    "Batch",
    "Budget",
    "CaptureMissing",
    "CapturesFolder",
    "Data",
    "Figure",
    "Force",
    "Gpu",
    "Gpus",
    "GpusPerLink",
    "HostMemory",
    "Json",
    "MinBytes",
    "Model",
    "ModelName",
    "ModelOptions",
    "NoCache",
    "Optimizer",
    "Output",
    "Policies",
    "Policy",
    "Precision",
    "RecipeParts",
    "Regime",
    "Rules",
    "TraceDevice",
    "busy",
    "model_options",
    "must_be_free",
    "must_be_one",
    "node_of",
    "recipe_of",
    "show",
    "show_results",
    "trace_of",
    "typed",
    "write_value",
]


ModelName = Annotated[
    str, typer.Argument(help="paper:vgg16, torchvision:resnet50, timm:…, hf:gpt2, or file.py:factory")
]
Model = Annotated[str, typer.Argument(help="torchvision:resnet50, hf:gpt2, file.py:factory, …, or a trace's file")]
Batch = Annotated[str, typer.Option("--batch", "-b", help="Batch size.")]
Gpu = Annotated[str, typer.Option(help="A GPU by id (`vdnn list gpus`), or a hardware file.")]
Policy = Annotated[str, typer.Option(help="A policy (`vdnn list policies`).")]
Policies = Annotated[
    list[str] | None, typer.Option("--policy", "--policies", help="A policy; again for another. Default: all.")
]
Budget = Annotated[str, typer.Option(help="Device memory for the step, 12GiB: the plan that fits and is the fastest.")]
Precision = Annotated[str, typer.Option(help="fp32, amp, amp-bf16 or bf16.")]
Optimizer = Annotated[str, typer.Option(help="none, sgd, sgd-nesterov or adamw.")]
Rules = Annotated[
    str,
    typer.Option(
        help="When copies are waited for. event: as late as memory allows; paper: at the end of every layer.",
    ),
]
Regime = Annotated[
    Literal["pytorch", "paper"],
    typer.Option(help="Whose step and memory. pytorch: today's; paper: Torch7's and one pool, with the paper's rules."),
]
Algorithms = Annotated[str, typer.Option(help="A table of convolution algorithms for -m, -p and vdnn-dyn: cudnn4.")]
TraceDevice = Annotated[str, typer.Option(help="cuda, or cpu for `vdnn run` on the virtual device.")]
ModelOptions = Annotated[
    list[str] | None, typer.Option("-O", metavar="KEY=VALUE", help="A model option: image_size=64.")
]
RecipeParts = Annotated[
    list[str] | None,
    typer.Option(
        "-R",
        metavar="KEY=VALUE",
        help="How the step is run: step=inference, attention=math, zero_grad=in-place, optimizer_impl=for-loop (or "
        "fused), backward_autocast=on, cudnn_benchmark=on.",
    ),
]
Gpus = Annotated[int, typer.Option(help="GPUs that train together (DDP), each on a batch of its own.")]
GpusPerLink = Annotated[int, typer.Option(help="Of those, how many share one link to the host.")]
HostMemory = Annotated[str, typer.Option(help="Host memory of the node, 512GiB: what all GPUs pin must fit.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MinBytes = Annotated[str, typer.Option(help="Smaller storages stay: 1MiB, 64KiB.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Capture anew, and keep nothing.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Write the value to this file.")]
DRAWN = (".png", ".svg", ".pdf")
Figure = Annotated[Path | None, typer.Option("--figure", "--plot", help="Draw it: NAME.png, .svg or .pdf.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output.")]
Data = Annotated[Path | None, typer.Option(help="The folder of published measurements (docs/costs.md).")]
CapturesFolder = Annotated[Path | None, typer.Option("--captures", help="Where the traces of measured rows are kept.")]
CaptureMissing = Annotated[bool, typer.Option(help="Capture measured rows that have no trace yet.")]


def typed(context: typer.Context) -> frozenset[str]:
    """The names of the options that were typed, and not left to their defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")


def node_of(gpus: int, gpus_per_link: int, host_memory: str) -> Node:
    """The node that the options describe, checked.

    Raises:
        UsageError: no GPUs, more on a link than there are, or no size.
    """
    from vdnn.units import parse_size

    node = Node(gpus, gpus_per_link, parse_size(host_memory) if host_memory else None)
    node.check()
    return node


def model_options(texts: list[str] | None) -> dict[str, object]:
    """`-O key=value` as keywords.

    Raises:
        UsageError: a text without a key and a "=".
    """
    return _pairs("-O", texts, "image_size=64")


def recipe_of(texts: list[str] | None) -> Recipe:
    """`-R key=value` as a recipe.

    Raises:
        UsageError: a text without a key and a "=", an unknown part or value.
    """
    return Recipe.of(_pairs("-R", texts, "attention=math"))


def _pairs(flag: str, texts: list[str] | None, example: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{flag} {text!r} is no option: write it like {example}")
        found[key] = value
    return found


def trace_of(
    model: str,
    batch: str,
    precision: str,
    optimizer: str,
    texts: list[str] | None,
    device: str = "cuda",
    no_cache: bool = False,
    policy: str = "",
    parts: list[str] | None = None,
    seen: dict[str, Trace] | None = None,
    asked: frozenset[str] = frozenset(),
) -> Trace:
    """The trace in a file, or of a model by name: one that was captured before, unless `no_cache`.

    With a policy, of the step that the policy is for: one that recomputes blocks, if it does that. `seen` are the
    traces that this command has taken of the model, by what its policies ask of it. `asked` are the options that were
    typed, with which a file's trace must agree.
    """
    from vdnn.policies import model_options as options_of

    if model.endswith((".json", ".json.gz")):
        loaded = load_value(model, "trace")
        assert isinstance(loaded, Trace)
        given = {"batch": batch, "precision": precision, "optimizer": optimizer, "device": device}
        _must_agree(loaded, model, {k: v for k, v in given.items() if k in asked}, [*(texts or []), *(parts or [])])
        return loaded
    recipe = recipe_of(parts)
    needed = options_of(policy) if policy not in ("", BUDGET) else {}
    if seen is not None and str(needed) in seen:
        return seen[str(needed)]
    options = {**needed, **model_options(texts)}
    key = None if no_cache else trace_cache.key_of(model, batch, options, precision, optimizer, device, recipe)
    found = trace_cache.known(key)
    if found is None:
        with busy(f"capturing {model}"):
            with importing():
                work = api.load(model, batch, **options)
            found = api.capture(work, precision=precision, optimizer=optimizer, device=device, recipe=recipe)
        trace_cache.keep(key, found)
    if seen is not None:
        seen[str(needed)] = found
    return found


def _must_agree(trace: Trace, file: str, asked: dict[str, str], texts: list[str]) -> None:
    """Check what is asked of a step that is there already.

    Raises:
        UsageError: it is another step than the trace's.
    """
    for name, value in asked.items():
        there = str(getattr(trace, name))
        if value != there:
            raise UsageError(
                f"{file} is a trace of {name} {there}, not {value}: leave --{name} out, or capture the model with it"
            )
    if texts:
        raise UsageError(f"{file} is a trace, which {texts[0]} no longer changes: leave it out, or capture with it")


def must_be_free(path: Path | None, force: bool, endings: tuple[str, ...] = (".json", ".json.gz")) -> None:
    """Check an output before the work that it is for.

    Raises:
        UsageError: it exists and `force` is not given, or it cannot be a file of this kind.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file in it")
    if path.exists() and not force:
        raise UsageError(f"{path} exists: give another name, or --force to overwrite it")
    if endings and not path.name.endswith(endings):
        raise UsageError(f"{path} must end in {' or '.join(endings)}")


def _takes_budget(policy: str) -> bool:
    from vdnn.planner import BUDGETED  # loads the planner, which a step without a budget need not wait for

    return policy in (BUDGET, *BUDGETED)


def must_be_one(*, policy: str, budget: str, plan: Path | None = None, asked: frozenset[str] = frozenset()) -> None:
    """Check what decides, before anything expensive.

    Args:
        asked: the options that were typed; those of a policy change nothing of a plan that was made.

    Raises:
        UsageError: more than one of them is given (vdnn-dyn and capuchin decide for a budget), an unknown policy,
            a budget that is no size, or an option of a policy beside a plan.
    """
    from vdnn.units import parse_size

    given = [name for name, value in (("--policy", policy), ("--budget", budget), ("--plan", plan)) if value]
    if len(given) > 1 and (given != ["--policy", "--budget"] or not _takes_budget(policy)):
        raise UsageError(f"{' and '.join(given)} are given: one of them decides, leave the others out")
    for name in ("rules", "algorithms", "min_bytes") if plan is not None else ():
        if name in asked:
            raise UsageError(f"--{name.replace('_', '-')} no longer changes the plan in {plan}: leave it out")
    if policy:
        must_be_policy(policy)
    if budget:
        parse_size(budget)


def write_value(value: Any, path: Path | None) -> None:
    """Write a value, if a file is given, and say so.

    Raises:
        UsageError: the file cannot be written.
    """
    if path is not None:
        try:
            save_value(value, path)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from None
        typer.echo(f"Wrote {path}", err=True)


def show_results(results: list[RunResult], as_json: bool) -> None:
    """Runs as a table, or as JSON rows."""
    from vdnn.reporting import result_rows, results_table

    if as_json:
        typer.echo(json.dumps(result_rows(results), indent=1))
    else:
        show(results_table(results))


def show(report: Any, width: int = 100) -> None:
    """A report on stdout: as wide as the terminal, or of `width` columns where there is none."""
    from vdnn.reporting import as_text

    if sys.stdout.isatty():
        width = max(shutil.get_terminal_size((width, 24)).columns, 60)
    typer.echo(as_text(report, width=width), nl=False)


@contextlib.contextmanager
def busy(what: str, *, told: bool = False) -> Iterator[None]:
    """On a terminal, a line that moves while something of unknown length goes on; elsewhere one on stderr if `told`."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        if told:
            typer.echo(f"vdnn: {what}", err=True)
        yield
        return
    with console.status(f"{what} …"):
        yield
