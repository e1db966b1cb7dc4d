"""Which locks guard what two threads touch: the lock-set check of Eraser (Savage et al., TOCS 1997).

A field that two threads touch, and at least one of them writes after the other came, must have a lock that was held at
every one of these accesses. The threads may run one after the other: what is found does not hang on luck.

    engine_with(rewrite=watched, names=monitor.names)   accesses to fields are written into the engine's source
    monitor.races                                       fields without a common lock

A field and what is in it (a list's items, a dict's entries) are two places. Some accesses need no lock:
the first owner's, until another thread comes; those of a deque's ends, which are atomic (its iteration is not); those
after an ownership changed hands, through a deque or because the only holder died in another thread.
"""

from __future__ import annotations

import ast
import sys
import threading
from collections import deque
from types import SimpleNamespace
from typing import Any

__all__ = ["Monitor", "watched"]

_READING = {"get", "items", "keys", "values", "copy", "index", "count"}
_ATOMIC = {"append", "appendleft", "pop", "popleft"}  # of a deque
_ITERATING = {"sorted", "list", "tuple", "set", "sum", "min", "max", "any", "all"}
_STATES = "__locksets__"


class _Place:
    """One field, as Eraser sees it: its first owner, then the locks that every access since has held."""

    __slots__ = ("locks", "owner", "written")

    def __init__(self, owner: threading.Thread) -> None:
        self.owner: threading.Thread | None = owner  # None once a second thread came
        self.locks: frozenset[object] = frozenset()
        self.written = False


class Monitor:
    """Hears of every access, and of every lock that is taken."""

    def __init__(self) -> None:
        self.races: list[str] = []
        self.accesses = 0
        self._held = threading.local()
        self._atomic = object()
        threads = SimpleNamespace(**{name: getattr(threading, name) for name in threading.__all__})
        threads.Lock = lambda: _Lock(threading.Lock(), self)
        threads.RLock = lambda: _Lock(threading.RLock(), self)
        self.names = {
            "__threading__": threads,
            "__read__": self._read,
            "__write__": self._write,
            "__method__": self._method,
            "__content__": self._content,
            "__dies__": self._dies,
        }

    @property
    def held(self) -> list[object]:
        """The locks that this thread holds, one that it took twice twice."""
        if not hasattr(self._held, "locks"):
            self._held.locks = []
        return self._held.locks

    def _read(self, owner: Any, field: str) -> Any:
        self._access(owner, field, False)
        return getattr(owner, field)

    def _write(self, owner: Any, field: str) -> None:
        self._access(owner, field, True, born=True)

    def _content(self, value: Any, owner: Any, field: str, write: bool) -> Any:
        if isinstance(value, list | dict | set | deque):
            self._access(owner, field + "[]", write, born=True)
        return value

    def _method(self, value: Any, owner: Any, field: str, name: str) -> Any:
        if isinstance(value, deque) and name in _ATOMIC:
            self._access(owner, field + "[]", True, born=True, extra=(self._atomic,))
            if name == "append":
                return lambda item: (self._hand_over(item), value.append(item))[1]
            if name in ("pop", "popleft"):
                return lambda: self._taken(getattr(value, name)())
        elif isinstance(value, list | dict | set | deque):
            self._access(owner, field + "[]", name not in _READING, born=True)
        return getattr(value, name)

    def _access(
        self, owner: Any, field: str, write: bool, *, born: bool = False, extra: tuple[object, ...] = ()
    ) -> None:
        if not type(owner).__module__.startswith("vdnn.engine"):
            return
        fields = getattr(owner, "__dict__", None)
        if fields is None or (not born and field not in fields):
            return  # a method, a class's constant
        self.accesses += 1
        places = fields.get(_STATES)
        if places is None:
            places = {}
            fields[_STATES] = places
        me = threading.current_thread()
        place = places.get(field)
        if place is None:
            places[field] = _Place(me)
            return
        if place.owner is me:
            return
        locks = frozenset((*self.held, *extra))
        if place.owner is not None:
            place.owner, place.locks = None, locks
        place.locks &= locks
        place.written |= write
        if place.written and not place.locks:
            self.races.append(f"{type(owner).__name__}.{field} is {'written' if write else 'read'} without the lock")

    def _hand_over(self, thing: Any) -> None:
        fields = getattr(thing, "__dict__", None)
        if fields is not None and type(thing).__module__.startswith("vdnn.engine"):
            fields.pop(_STATES, None)

    def _taken(self, thing: Any) -> Any:
        self._hand_over(thing)
        return thing

    def _dies(self, thing: Any) -> None:
        """What a dying object alone has held belongs to the thread that it dies in."""
        self._hand_over(thing)
        for value in list(thing.__dict__.values()):
            if sys.getrefcount(value) <= 4:  # the dying object's, the list's, `value` and the argument
                self._hand_over(value)


class _Lock:
    """A lock that tells who holds it."""

    def __init__(self, lock: Any, monitor: Monitor) -> None:
        self._lock = lock
        self._monitor = monitor

    def acquire(self, *args: Any, **kwargs: Any) -> bool:
        taken: bool = self._lock.acquire(*args, **kwargs)
        if taken:
            self._monitor.held.append(self)
        return taken

    def release(self) -> None:
        self._monitor.held.remove(self)
        self._lock.release()

    __enter__ = acquire

    def __exit__(self, *error: object) -> None:
        self.release()


# -- the accesses, written into the source ---------------------------------------------------------


def watched(tree: ast.Module) -> ast.Module:
    """The same module; every access to a field in one of its functions is told to the monitor first."""
    rewritten: ast.Module = _Watching().visit(tree)
    return rewritten


class _Watching(ast.NodeTransformer):
    def __init__(self) -> None:
        self._inside = 0

    def visit_Import(self, node: ast.Import) -> Any:
        names = [alias for alias in node.names if alias.name != "threading"]
        if len(names) == len(node.names):
            return node
        ours = ast.parse("threading = __threading__").body[0]
        return [ast.Import(names), ours] if names else ours

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        # the monitor keeps its notes in the objects themselves: they need a __dict__
        node.body = [stmt for stmt in node.body if not _is_slots(stmt)] or [ast.Pass()]
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call):
                decorator.keywords = [k for k in decorator.keywords if k.arg != "slots"]
        node.body = [self.visit(stmt) for stmt in node.body]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        self._inside += 1
        node.body = self._block(node.body)
        self._inside -= 1
        if node.name == "__del__":
            node.body.insert(0, ast.Expr(_call("__dies__", ast.Name(node.args.args[0].arg, ast.Load()))))
        return node

    def _block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for stmt in body:
            told = self._writes(stmt)
            result = self.visit(stmt)
            found += told
            found += result if isinstance(result, list) else [result]
        return found

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "type_comment"):
                continue
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                setattr(node, field, self._block(value))
            elif isinstance(value, list):
                setattr(node, field, [self.visit(item) if isinstance(item, ast.AST) else item for item in value])
            elif isinstance(value, ast.AST):
                setattr(node, field, self.visit(value))
        return node

    def _writes(self, stmt: ast.stmt) -> list[ast.stmt]:
        """A line for each field, and each field's content, that the statement itself writes."""
        if isinstance(stmt, ast.Assign | ast.Delete):
            targets = list(stmt.targets)
        elif isinstance(stmt, ast.AugAssign) or (isinstance(stmt, ast.AnnAssign) and stmt.value is not None):
            targets = [stmt.target]
        else:
            return []
        told: list[ast.stmt] = []
        for target in targets:
            for node in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
                if isinstance(node, ast.Attribute):
                    told.append(ast.Expr(_call("__write__", _again(node.value), ast.Constant(node.attr))))
                elif isinstance(node, ast.Subscript) and (place := _place(node.value)) is not None:
                    owner, name = place
                    told.append(
                        ast.Expr(
                            _call("__content__", _again(node.value), owner, ast.Constant(name), ast.Constant(True))
                        )
                    )
        return told

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        node.value = self.visit(node.value)
        if not self._inside or not isinstance(node.ctx, ast.Load) or _is_super(node.value):
            return node
        return _call("__read__", node.value, ast.Constant(node.attr))

    def visit_Call(self, node: ast.Call) -> Any:
        func = node.func
        place = _place(func.value) if isinstance(func, ast.Attribute) and self._inside else None
        if isinstance(func, ast.Name) and func.id in _ITERATING:
            node.args = [self._contents(arg) for arg in node.args]
        self.generic_visit(node)
        if place is not None and isinstance(func, ast.Attribute):
            owner, name = place
            asked = node.func
            assert isinstance(asked, ast.Call)  # __read__(value, "method")
            node.func = _call("__method__", asked.args[0], owner, ast.Constant(name), ast.Constant(func.attr))
        return node

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        if isinstance(node.ctx, ast.Load):
            node.value = self._contents(node.value)
        return self.generic_visit(node)

    def visit_For(self, node: ast.For) -> Any:
        node.iter = self._contents(node.iter)
        return self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> Any:
        node.iter = self._contents(node.iter)
        return self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> Any:
        if isinstance(node.ops[0], ast.In | ast.NotIn):
            node.comparators[0] = self._contents(node.comparators[0])
        return self.generic_visit(node)

    def _contents(self, node: ast.expr) -> ast.expr:
        place = _place(node) if self._inside else None
        if place is None:
            return node
        owner, name = place
        return _call("__content__", node, owner, ast.Constant(name), ast.Constant(False))


def _place(node: ast.expr) -> tuple[ast.expr, str] | None:
    """Whose field a container is: `self._queues[stream]` is in `self._queues`."""
    while isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute) and not _is_super(node.value):
        return _again(node.value), node.attr
    return None


def _again(node: ast.expr) -> ast.expr:
    """The same expression once more, unwatched; the engine's fields have owners that cost nothing to name twice."""
    copy: ast.expr = ast.parse(ast.unparse(node), mode="eval").body
    return copy


def _call(name: str, *args: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(args), [])


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _is_slots(stmt: ast.stmt) -> bool:
    return isinstance(stmt, ast.Assign) and isinstance(stmt.targets[0], ast.Name) and stmt.targets[0].id == "__slots__"
