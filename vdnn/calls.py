"""Who is running: names for module calls and for what autograd packs in them.

Capture and engine must give the same saved tensor the same name, so both take it from here:

    calls = ModuleCalls(model, on_begin, on_end)
    calls.attach()            # forward hooks on every module
    model(x)                  # root call begins: counters start at 0; calls.current is the innermost frame
    frame.packs += 1          # the n-th pack of that call

It holds no module: a model whose hooks lead here is freed when its last user lets go of it, without the garbage
collector. A module that is registered under two names has the first one. A call outside the root's forward (a
recomputation in backward, a submodule called by the user's own code) has no frame: `current` stays None.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Frame", "Hook", "ModuleCalls"]


_NONE: dict[str, Any] = {}


class Frame:
    """One call of one module while it runs. `packs` counts the tensors packed in it so far.

    `args` and `kwargs` are what it is called with, only while its begin or end is told; `output` is what it gives, only
    while its end is.
    """

    __slots__ = ("args", "call", "fqn", "kwargs", "module", "output", "packs", "parent", "slot")

    def __init__(self, module: nn.Module, fqn: str, call: int, parent: Frame | None) -> None:
        self.module = module
        self.fqn = fqn
        self.call = call
        self.parent = parent
        self.packs = 0
        self.slot: Any = None  # whatever the owner keeps with the call
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = _NONE
        self.output: Any = None


Listener = Callable[[Frame], None]


class Hook:
    """A function on a module's hook list that does not follow the module into a copy or a pickle: there it is inert.

    Who takes it off lets it `rest`: torch still calls a hook that is removed while a module's hooks run, and with other
    arguments.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self._function = function

    def __call__(self, *args: Any) -> None:
        if self._function is not None:
            self._function(*args)

    def rest(self) -> None:
        """Do nothing from now on."""
        self._function = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


class ModuleCalls:
    """Follows the forward calls of a model's modules. `on_begin` and `on_end` hear of every frame."""

    def __init__(self, root: nn.Module, on_begin: Listener | None = None, on_end: Listener | None = None) -> None:
        self._root = weakref.ref(root)
        # by id: a call comes from a hook on the module, so it lives, and the id is its own
        self._names: dict[int, str] = {}
        self.current: Frame | None = None
        self._on_begin = on_begin
        self._on_end = on_end
        self._counts: dict[int, int] = {}
        self._handles: list[RemovableHandle] = []
        self._hooks: tuple[Hook, ...] = ()

    @property
    def root(self) -> nn.Module:
        """The model, which lives: who calls this is one of its hooks, or holds it."""
        root = self._root()
        assert root is not None
        return root

    def attach(self) -> None:
        """Hook every module of the model; the first hook to run before forward, the last after it."""
        begin, end = self._hooks = Hook(self._begin), Hook(self._end)
        self._names = {id(module): fqn for fqn, module in self.root.named_modules()}
        for module in self.root.modules():
            self._handles.append(module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
            # always_call: the frame must end when forward raises, too
            self._handles.append(module.register_forward_hook(end, with_kwargs=True, always_call=True))

    def detach(self) -> None:
        """Take all hooks off again."""
        for handle in self._handles:
            handle.remove()
        for hook in self._hooks:
            hook.rest()
        self._handles.clear()
        self.current = None

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        parent = self.current
        if parent is not None and module is self._root() and not self._runs_inside_itself():
            parent = None  # an earlier forward was broken off (KeyboardInterrupt skips forward hooks)
        if parent is None:
            if module is not self._root():
                return
            self._counts.clear()
        key = id(module)
        call = self._counts.get(key, 0)
        self._counts[key] = call + 1
        frame = self.current = Frame(module, self._names[key], call, parent)
        if self._on_begin is not None:
            frame.args, frame.kwargs = args, kwargs
            self._on_begin(frame)
            frame.args, frame.kwargs = (), _NONE

    def _runs_inside_itself(self) -> bool:
        """Whether the root's forward is really on the Python stack beside the call that begins now."""
        frame, calls, root = sys._getframe(), 0, self._root()
        while frame is not None and calls < 2:
            if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is root:
                calls += 1
            frame = frame.f_back  # type: ignore[assignment]
        return calls >= 2

    def _end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        frame = self.current
        if frame is None or frame.module is not module:
            return
        frame.args, frame.kwargs, frame.output = args, kwargs, output
        try:
            if self._on_end is not None:
                self._on_end(frame)
        finally:
            frame.args, frame.kwargs, frame.output = (), _NONE, None
            self.current = frame.parent
