"""Traces that were captured before, kept on disk: a second look at a model takes no capture, and no torch.

The key is everything that decides a trace: the model's name, batch and options as given, precision, optimizer,
recipe, device, the versions of the libraries that models come from, and the source of vdnn's own capture and models.
A model from a file of the user's is not kept: what that file imports cannot be known.

    $VDNN_CACHE/<key>.json.gz, by default under ~/.cache/vdnn/traces ($XDG_CACHE_HOME)
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from vdnn.errors import FormatError
from vdnn.values import USUAL, Recipe, Trace, load, save

__all__ = ["folder", "keep", "key_of", "known"]

log = logging.getLogger("vdnn")

# More files than that, and the oldest go: a trace takes 10 KB to 1 MB.
MOST = 300
_LIBRARIES = ("torch", "torchvision", "timm", "transformers")
_SOURCES = ("tracing", "models", "calls.py", "checkpointing.py", "values")


def folder() -> Path:
    """Where traces are kept."""
    named = os.environ.get("VDNN_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vdnn" / "traces"


def key_of(
    model: str,
    batch: str,
    options: Mapping[str, object],
    precision: str,
    optimizer: str,
    device: str,
    recipe: Recipe = USUAL,
) -> str | None:
    """The key of a trace, 32 hex digits; None for a model that is not kept."""
    if ".py:" in model:
        return None
    parts = {
        "model": model,
        "batch": str(batch),
        "options": sorted((name, str(value)) for name, value in options.items()),
        "precision": precision,
        "optimizer": optimizer,
        "device": device,
        "recipe": asdict(recipe),
        "libraries": [_version(name) for name in _LIBRARIES],
        "source": _source(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def known(key: str | None) -> Trace | None:
    """The trace of a key, if it is there and whole."""
    if key is None:
        return None
    path = folder() / f"{key}.json.gz"
    if not path.exists():
        return None
    try:
        found = load(path, "trace")
    except FormatError as error:
        log.debug("vdnn: %s is not used: %s", path, error)
        return None
    assert isinstance(found, Trace)
    return found


def keep(key: str | None, trace: Trace) -> None:
    """Keep a trace; a disk that cannot be written to is no error."""
    if key is None:
        return
    try:
        save(trace, folder() / f"{key}.json.gz")
        files = sorted(folder().glob("*.json.gz"), key=lambda path: path.stat().st_mtime)
        for path in files[:-MOST]:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.debug("vdnn: the trace is not kept: %s", error)


def _version(library: str) -> str:
    try:
        return f"{library} {metadata.version(library)}"
    except metadata.PackageNotFoundError:
        return f"{library} absent"


def _source() -> str:
    """A digest of the code that decides what a trace says."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for name in _SOURCES:
        place = package / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.relative_to(package).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
