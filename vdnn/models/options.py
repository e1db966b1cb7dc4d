"""Options of a model, such as image_size=288: Python values, or texts from a command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vdnn.errors import UsageError, unknown_name

__all__ = ["Option", "choice", "fraction", "identity", "read", "whole"]

Reader = Callable[[str, object], Any]


@dataclass(frozen=True, slots=True)
class Option:
    """One option: how its value is read, and what it means, for help texts."""

    read: Reader
    meaning: str


def whole(name: str, value: object, least: int = 1) -> int:
    """A whole number of at least `least`.

    Raises:
        UsageError: not a whole number, or too small.
    """
    number: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str):
        try:
            number = int(value)
        except ValueError:
            number = None
    if number is None:
        raise UsageError(f"{name}={value} is not a whole number: write it like {name}={max(least, 32)}")
    if number < least:
        raise UsageError(f"{name}={number} is too small: it must be at least {least}")
    return number


def fraction(name: str, value: object) -> float:
    """A number above 0, such as 0.25.

    Raises:
        UsageError: not a number, or not above 0.
    """
    number: float | None = None
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = None
    if number is None or not 0 < number < float("inf"):
        raise UsageError(f"{name}={value} is not a number above 0: write it like {name}=0.25")
    return number


def choice(*allowed: str) -> Reader:
    """A reader of one of these words."""

    def one_of(name: str, value: object) -> str:
        if value not in allowed:
            raise unknown_name(f"value of {name}", str(value), allowed)
        return str(value)

    return one_of


def read(model: str, given: Mapping[str, object], known: Mapping[str, Option]) -> dict[str, Any]:
    """The values of the options that were given.

    Raises:
        UsageError: an option that the model does not have, or a value that cannot be read.
    """
    for name in given:
        if name not in known:
            if not known:
                raise UsageError(f"{model} has no option {name!r}: it has none")
            raise unknown_name(f"option of {model}", name, known)
    return {name: known[name].read(name, value) for name, value in given.items()}


def identity(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Options as part of a model's identity: texts, in order of name."""
    return tuple(sorted((name, str(value)) for name, value in values.items()))
