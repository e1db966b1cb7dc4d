"""The engine's modules loaded anew beside the real ones, from a mutated or otherwise rewritten syntax tree."""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import vdnn
from tests.engine.mutation.operators import UNRECORDED, Mutant

__all__ = ["ENGINE", "FILES", "MutationError", "engine_with"]

ENGINE = Path(vdnn.__file__).parent / "engine"
FILES = sorted(str(path.relative_to(ENGINE)) for path in ENGINE.rglob("*.py"))

Rewrite = Callable[[ast.Module], ast.Module]


class MutationError(BaseException):
    """A mutant is not what it was meant to be: whatever it does now proves nothing."""


def _unrecorded(event: Any) -> Any:
    """The event as if it had not been recorded: CUDA does not wait for such a one, and says nothing."""
    try:
        event.known.clear()
    except AttributeError as error:
        raise MutationError(
            "an event no longer says what it knows in `known`: teach `_unrecorded` the new form"
        ) from error
    return event


@cache
def _code(file: str, rewrite: Rewrite | None) -> CodeType:
    tree = ast.parse((ENGINE / file).read_text())
    return _compiled(tree, file, rewrite)


def _compiled(tree: ast.Module, file: str, rewrite: Rewrite | None) -> CodeType:
    if rewrite is not None:
        tree = ast.fix_missing_locations(rewrite(copy.deepcopy(tree)))
    return compile(tree, str(ENGINE / file), "exec")


class _Loader(importlib.abc.Loader):
    def __init__(self, code: CodeType, names: Mapping[str, object]) -> None:
        self._code = code
        self._names = names

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self._names)
        exec(self._code, vars(module))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant | None, rewrite: Rewrite | None, names: Mapping[str, object]) -> None:
        self._mutant = mutant
        self._rewrite = rewrite
        self._names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _ours(name):
            return None
        stem = name.removeprefix("vdnn.engine").removeprefix(".").replace(".", "/")
        package = f"{stem}/__init__.py".lstrip("/")
        file = package if package in FILES else f"{stem}.py"
        if self._mutant is not None and self._mutant.file == file:
            code = _compiled(self._mutant.tree, file, self._rewrite)
        else:
            code = _code(file, self._rewrite)
        return importlib.util.spec_from_loader(name, _Loader(code, self._names), is_package=file == package)


def _ours(name: str) -> bool:
    return name == "vdnn.engine" or name.startswith("vdnn.engine.")


@contextlib.contextmanager
def engine_with(
    mutant: Mutant | None = None, rewrite: Rewrite | None = None, names: Mapping[str, object] | None = None
) -> Iterator[ModuleType]:
    """`vdnn.engine` with one file mutated, inside the block.

    Args:
        rewrite: what to do to the syntax tree of every file; always the same function for the same names.
        names: what every module finds among its global names besides its own.
    """
    finder = _Finder(mutant, rewrite, {UNRECORDED: _unrecorded, **(names or {})})
    real = {name: module for name, module in sys.modules.items() if _ours(name)}
    package = vdnn.__dict__.get("engine")
    for name in real:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield importlib.import_module("vdnn.engine")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _ours(name)]:
            del sys.modules[name]
        sys.modules.update(real)
        if package is not None:
            vdnn.engine = package  # type: ignore[attr-defined]
