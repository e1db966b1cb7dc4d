"""`replay`: a recorded PyTorch memory snapshot through the model of the allocator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vdnn.cli.arguments import Json

if TYPE_CHECKING:
    from vdnn.replay import DeviceReplay

__all__ = ["replay"]


def replay(
    snapshot: Annotated[Path, typer.Argument(help="What torch.cuda.memory._dump_snapshot(FILE) wrote.")],
    as_json: Json = False,
) -> None:
    """Replay a recorded memory snapshot: every address, segment and number again, or the first that differs.

    Exit code 1 if something differs. The file is read without running anything of it.

    Example: vdnn replay snapshot.pickle
    """
    from vdnn.replay import replay_snapshot
    from vdnn.snapshots import read_snapshot

    devices = replay_snapshot(read_snapshot(snapshot))
    if as_json:
        typer.echo(json.dumps([_row(device) for device in devices], indent=1))
    else:
        for device in devices:
            typer.echo(_text(device))
    if any(device.difference is not None for device in devices):
        raise typer.Exit(1)


def _row(device: DeviceReplay) -> dict[str, object]:
    difference = device.difference
    return {
        "device": device.device,
        "events": device.events,
        "reproduced": device.reproduced,
        "actions": dict(device.actions),
        "segments": device.segments,
        "blocks": device.blocks,
        "statistics": device.statistics,
        "checked_statistics": device.checked_statistics,
        "difference": None
        if difference is None
        else {
            "event": difference.event,
            "what": difference.what,
            "recorded": difference.recorded,
            "modelled": difference.modelled,
        },
        "notes": list(device.notes),
    }


def _text(device: DeviceReplay) -> str:
    from vdnn.units import format_bytes

    numbers = device.statistics
    counts = ", ".join(f"{count} {action}" for action, count in device.actions)
    lines = [f"device {device.device}: {device.events} events ({counts})"]
    difference = device.difference
    if difference is None:
        lines.append(
            f"  no difference: every event, and at the end {device.segments} segments with {device.blocks} blocks"
            + (f" and {device.checked_statistics} statistics" if device.checked_statistics else "")
        )
        peaks = (
            f"{format_bytes(numbers[f'{level}_bytes.all.peak'])} {level}"
            for level in ("requested", "allocated", "active", "reserved")
        )
        lines.append(f"  peaks: {', '.join(peaks)}")
    else:
        where = f"event {difference.event}" if difference.event >= 0 else "the end"
        lines += [
            f"  first difference at {where}, after {device.reproduced} events as recorded: {difference.what}",
            f"    recorded: {difference.recorded}",
            f"    modelled: {difference.modelled}",
        ]
    lines += [f"  {note}" for note in device.notes]
    return "\n".join(lines)
