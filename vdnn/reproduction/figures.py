"""The file of each figure, from the run files of the networks: `fig11.json` and the others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdnn.reproduction.differences import published
from vdnn.reproduction.networks import DEEP, POLICIES

__all__ = ["write_files"]

_CATEGORIES = ("weights_mib", "feature_maps_mib", "gradient_maps_mib", "workspace_mib")
# Which network the figures by layer show, where it was run.
_BY_LAYER = {
    "fig5": ("VGG-16(256)", ("maps_mib", "workspace_mib", "weights_mib")),
    "fig6": ("VGG-16(64)", ("forward_ms", "backward_ms", "reuse_ms")),
    "fig13": ("VGG-16(64)", ("forward_gb_per_s", "backward_gb_per_s")),
}


def write_files(folder: Path, numbers: Mapping[str, Mapping[str, Any]]) -> None:
    """Write each figure's file; `numbers` are those of the run files, by network."""
    files: dict[str, Any] = {
        "fig1": {n: _only(d["memory"], ("total_mib", "largest_layer_percent")) for n, d in numbers.items()},
        "fig4": {n: _only(d["memory"], _CATEGORIES) for n, d in numbers.items()},
        "fig11": {
            n: {label: _only(d["policies"][label], ("max_mib", "avg_mib")) for label in POLICIES}
            for n, d in numbers.items()
        },
        "fig12": {
            n: {
                "all_mib": _round(d["policies"]["all(m)"]["offloaded_mib"]),
                "conv_mib": _round(d["policies"]["conv(m)"]["offloaded_mib"]),
            }
            for n, d in numbers.items()
        },
        "fig14": {n: _performance(d) for n, d in numbers.items()},
        "fig15": {
            n: {
                "gpu_mib": _round(d["policies"]["all(p)"]["max_mib"]),
                "cpu_mib": _round(d["policies"]["all(p)"]["host_mib"]),
                "base_mib": _round(d["policies"]["base(p)"]["max_mib"]),
            }
            for n, d in numbers.items()
            if n in DEEP
        },
        "dyn": {n: d["dyn"] for n, d in numbers.items()},
        "dyn_log": {n: d["dyn_log"] for n, d in numbers.items()},
    }
    for name, (network, columns) in _BY_LAYER.items():
        if network in numbers:
            files[name] = {row["layer"]: _only(row, columns) for row in numbers[network]["layers"]}
    for row in files.get("fig6", {}).values():  # FC layers are no feature extraction: their times are the paper's
        row["reuse_ms"] = _round(row["reuse_ms"] + published()["fc_ms"])
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def _only(row: Mapping[str, Any], columns: tuple[str, ...]) -> dict[str, float]:
    return {name: _round(row[name]) for name in columns}


def _performance(numbers: Mapping[str, Any]) -> dict[str, float]:
    base = numbers["policies"]["base(p)"]["time_ms"]
    return {label: round(base / row["time_ms"], 4) for label, row in numbers["policies"].items()}


def _round(number: float) -> float:
    return round(number, 2)
