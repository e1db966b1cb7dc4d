"""What a sweep, a node's sweep and a frontier have in common: models on GPUs, and a figure with its caption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["STUDY", "Model", "Study", "made_of"]

Model = tuple[str, int, tuple[tuple[str, Any], ...]]  # its name, a batch, and options
# The keys of a study's table in an experiment: type, default (... where there is none).
STUDY: dict[str, tuple[Any, Any]] = {
    "title": (str, ...),
    "text": (str, ""),
    "file": (str, ...),
    "caption": (str, ""),
    "models": (list, ...),
    "gpus": (list, ...),
    "optimizer": (str, "none"),
}


@dataclass(frozen=True, slots=True)
class Study:
    """Every model on every GPU: one piece of work each, and one figure, `file`, of all."""

    title: str
    text: str
    file: str
    caption: str
    models: tuple[Model, ...]
    gpus: tuple[str, ...]
    optimizer: str


_Kind = TypeVar("_Kind", bound=Study)


def made_of(kind: type[_Kind], read: dict[str, Any], models: tuple[Model, ...]) -> _Kind:
    """A study from its table, whose keys and models were checked."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in read.items()}
    values["models"] = models
    return kind(**values)
