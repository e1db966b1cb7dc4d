"""`measure`: what the device that is here can do, as a hardware file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vdnn.cli.arguments import Force, Json, must_be_free, show
from vdnn.errors import UsageError

__all__ = ["measure"]


def measure(
    output: Annotated[Path, typer.Option("-o", "--output", help="The hardware file to write: NAME.toml.")],
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto: the GPU if there is one, else the CPU.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads of a CPU; 0: as many as torch takes.")] = 0,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Measure link, memory, products, convolutions and launches of a real device, in under a minute.

    Example: vdnn measure --device cpu --threads 1 -o cpu.toml
    """
    from vdnn.reporting import hardware_row, hardware_table
    from vdnn.values import to_toml

    must_be_free(output, force, (".toml",))
    if threads < 0:
        raise UsageError(f"{threads} threads are too few: give 1 or more, or 0 for torch's own number")
    import torch

    from vdnn.measuring import measure_device

    if threads:
        torch.set_num_threads(threads)
    found = measure_device(device, tell=lambda what: typer.echo(f"vdnn: {what} …", err=True))
    if as_json:
        typer.echo(json.dumps(hardware_row(found), indent=1))
    else:
        show(hardware_table([found]))
    try:
        output.write_text(to_toml(found))
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}") from None
    typer.echo(f"Wrote {output}", err=True)
