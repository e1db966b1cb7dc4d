"""The five values that vdnn's stages hand to one another: frozen, checked, with a versioned JSON form."""

from vdnn.values.algorithms import AlgorithmTable, algorithm_table, table_ids
from vdnn.values.codec import dumps, fingerprint, load, loads, save
from vdnn.values.hardware import Efficiency, Hardware, Peak, Source, Timing, hardware, preset_ids, to_toml
from vdnn.values.node import ALONE, Node
from vdnn.values.plan import (
    OUTSIDE,
    Action,
    ConvChoice,
    Copy,
    Encode,
    Entry,
    Keep,
    Offload,
    Plan,
    Point,
    Recompute,
    SavedName,
)
from vdnn.values.recipe import USUAL, Recipe
from vdnn.values.result import PeakItem, Provenance, RunResult
from vdnn.values.timeline import STREAMS, MemoryEvent, Span, Stall, Timeline
from vdnn.values.trace import Category, Kernel, LayerKind, ModuleCall, Op, Phase, SavedTensor, Storage, Trace

__all__ = [
    "ALONE",
    "OUTSIDE",
    "STREAMS",
    "USUAL",
    "Action",
    "AlgorithmTable",
    "Category",
    "ConvChoice",
    "Copy",
    "Efficiency",
    "Encode",
    "Entry",
    "Hardware",
    "Keep",
    "Kernel",
    "LayerKind",
    "MemoryEvent",
    "ModuleCall",
    "Node",
    "Offload",
    "Op",
    "Peak",
    "PeakItem",
    "Phase",
    "Plan",
    "Point",
    "Provenance",
    "Recipe",
    "Recompute",
    "RunResult",
    "SavedName",
    "SavedTensor",
    "Source",
    "Span",
    "Stall",
    "Storage",
    "Timeline",
    "Timing",
    "Trace",
    "algorithm_table",
    "dumps",
    "fingerprint",
    "hardware",
    "load",
    "loads",
    "preset_ids",
    "save",
    "table_ids",
    "to_toml",
]
