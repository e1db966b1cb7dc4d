"""`advise`: which GPU for a model."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vdnn.cli.arguments import (
    DRAWN,
    Batch,
    Figure,
    Force,
    Json,
    Model,
    ModelOptions,
    NoCache,
    Optimizer,
    Precision,
    busy,
    must_be_free,
    show,
    trace_of,
    typed,
)
from vdnn.errors import UsageError
from vdnn.values import hardware, preset_ids

__all__ = ["advise"]


def advise(
    context: typer.Context,
    model: Model,
    batch: Batch = "32",
    gpu: Annotated[list[str] | None, typer.Option(help="A GPU; again for another. Default: all presets.")] = None,
    precision: Precision = "amp",
    optimizer: Optimizer = "sgd",
    options: ModelOptions = None,
    no_cache: NoCache = False,
    as_json: Json = False,
    figure: Figure = None,
    force: Force = False,
) -> None:
    """Say on which GPUs a training step fits, with what plan, and what that costs.

    Example: vdnn advise torchvision:resnet50 --batch 256 --figure resnet50-gpus.png
    """
    from dataclasses import fields

    from vdnn.advising import Advice
    from vdnn.advising import advise as advices
    from vdnn.policies import model_options as options_of
    from vdnn.reporting import advice_table, result_rows

    machines = [hardware(name) for name in gpu or preset_ids()]
    must_be_free(figure, force, DRAWN)
    trace = trace_of(model, batch, precision, optimizer, options, no_cache=no_cache, asked=typed(context))
    blocks = None
    if not model.endswith((".json", ".json.gz")) and options_of("checkpoint"):
        try:
            blocks = trace_of(model, batch, precision, optimizer, options, no_cache=no_cache, policy="checkpoint")
        except UsageError:
            blocks = None  # the model has no repeated blocks
    with busy(f"planning {model} for {len(machines)} GPUs", told=True):
        found = advices(trace, blocks, machines)
    own = [field.name for field in fields(Advice) if field.name not in ("result", "without")]
    rows: list[dict[str, Any]] = [
        {
            **result_rows([one.result], one.without)[0],
            **{name: getattr(one, name) for name in own},
            "slowdown": one.slowdown,
        }
        for one in found
    ]
    title = f"{trace.model} · batch {trace.batch} · {trace.precision} · {trace.optimizer}"
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        show(advice_table(rows, title), width=110)
    if figure is not None:
        from vdnn.reporting.plots import advice_figure, save_figure

        typer.echo(f"Wrote {save_figure(advice_figure(rows, title), figure)}", err=True)
