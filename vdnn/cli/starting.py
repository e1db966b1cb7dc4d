"""A quick start for commands that compute nothing: without torch's compiler.

Fake tensors import `torch._dynamo` for one setting, and torch's functions ask it to be left out of a compilation
that never comes; torchvision asks it one question at import. Loading it takes longer than capturing ResNet-50.

    import torch._dynamo, in a process that asked for `without_compiler`
        gives a stand-in: the real `config`, and a `disable` that leaves functions as they are; the name of a tensor's
        source, which matters to symbolic shapes alone, is a text
    anything else asked of it, or of its other submodules
        loads the real one in its place

For processes of the command line alone: whoever imports vdnn gets torch as it is.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

__all__ = ["importing", "without_compiler"]

_NAME = "torch._dynamo"
_UTILS, _SOURCE = f"{_NAME}.utils", f"{_NAME}.source"


def without_compiler() -> None:
    """Serve the stand-in from now on, if torch is not loaded yet."""
    if "torch" not in sys.modules:
        sys.meta_path.insert(0, _Finder())


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import much at once: what comes of it stays, so that the garbage collector need not look at it, now or later."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stand-in, and what is to be seen of it."""

    def __init__(self) -> None:
        self.left: list[Any] = []  # functions that torch believes disabled

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == _NAME:
            real = importlib.machinery.PathFinder.find_spec(name, path)
            if real is None or real.submodule_search_locations is None:
                return None
            spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
            spec.submodule_search_locations = list(real.submodule_search_locations)
            return spec
        if name.startswith(f"{_NAME}.") and name != f"{_NAME}.config":
            if name in (_UTILS, _SOURCE):
                return importlib.machinery.ModuleSpec(name, self)
            self.real()  # it imports this one, too
            found = sys.modules.get(name)
            return importlib.machinery.ModuleSpec(name, _Loaded(found)) if found is not None else None
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if name == _NAME:
            for decorator in ("disable", "assume_constant_result", "allow_in_graph"):
                setattr(module, decorator, self._left)
            module.graph_break = lambda *_, **__: None  # type: ignore[attr-defined]
        elif name == _UTILS:
            module.is_compile_supported = lambda *given: self.real(name).is_compile_supported(*given)  # type: ignore[attr-defined]

        def other(attribute: str) -> Any:
            if attribute.startswith("__"):  # what the import system looks at
                raise AttributeError(attribute)
            if name == _SOURCE:
                setattr(module, attribute, type(attribute, (str,), {}))
                return module.__dict__[attribute]
            return getattr(self.real(name), attribute)

        module.__getattr__ = other  # type: ignore[method-assign]

    def _left(self, fn: Any = None, *_: Any, **__: Any) -> Any:
        if fn is None:
            return self._left
        self.left.append(fn)
        return fn

    def real(self, name: str = _NAME) -> Any:
        """The real module; the first time it takes the stand-in's place."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            for stand_in in (_NAME, _UTILS, _SOURCE):
                sys.modules.pop(stand_in, None)
            for fn in self.left:  # so that torch asks again
                getattr(fn, "__dict__", {}).pop("__dynamo_disable", None)
            importlib.import_module(_NAME)
        return importlib.import_module(name)


class _Loaded(importlib.abc.Loader):
    """Gives a module that is loaded already."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        pass
