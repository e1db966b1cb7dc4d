"""Mutants of a source file: each has one thing taken out that keeps the engine's work in order.

What is looked for are forms, not lines: a call of this name, a comparison that mentions that word. So a line that is
written tomorrow gets its mutant without anybody thinking of it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["KINDS", "UNRECORDED", "Mutant", "mutants_of"]

UNRECORDED = "__unrecorded__"  # the name of a function that makes a recorded event one that was never recorded

KINDS = {
    "record": "an event is never recorded: whoever waits for it waits for nothing",
    "wait": "a stream, or the host, does not wait",
    "version": "versions are not compared: every one passes for the right one",
    "identity": "a storage passes for another one, at whose address it lies",
    "lock": "a lock's body runs without the lock",
    "hand-over": "memory that changes hands goes without the event, or the stream, that still uses it",
    "bound": "a bound, a budget or a limit is never reached",
    "probe": "the probe of the version is not what it should be: it keeps the tensor, its node or its bytes",
    "memory": "memory that is let go is not let go",
    "address": "an address is not kept modulo the alignment",
    "untouched": "what must never move may move",
    "check": "the race detector leaves out one of its checks",
}

_WAIT = re.compile(r"_?wait(_\w+)?|arrive|synchronize")
_RECORD = re.compile(r"record|record_event")
_VERSION = re.compile(r"version|changes")
_STORAGE = re.compile(r"^(untyped_)?storage$")
_LOCK = re.compile(r"(^|_)r?lock$")
_LIMIT = re.compile(r"bound$|budget|limit")
_NEVER_MOVES = {"holds": True, "belongs": False}


@dataclass(frozen=True)
class Mutant:
    """One mutant: `tree` is the whole file without the thing, `text` the source of the thing."""

    kind: str
    file: str
    line: int
    text: str
    tree: ast.Module

    def __str__(self) -> str:
        return f"{self.kind:9} {self.file}:{self.line}  {self.text}"


def mutants_of(source: str, file: str) -> list[Mutant]:
    """Every mutant of a source file, in the order of its lines."""
    sites = _Cutter()
    sites.visit(ast.parse(source, file))
    mutants = []
    for index, (kind, line, text) in enumerate(sites.found):
        tree = _Cutter(index).visit(ast.parse(source, file))
        mutants.append(Mutant(kind, file, line, text, ast.fix_missing_locations(tree)))
    return sorted(mutants, key=lambda mutant: mutant.line)


def _name(node: ast.expr) -> str:
    """The last name of `a.b.c` or `a.b.c(…)`."""
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _mentions(pattern: re.Pattern[str], node: ast.AST) -> bool:
    names = (_name(inner) for inner in ast.walk(node) if isinstance(inner, ast.Name | ast.Attribute))
    return any(pattern.search(name) for name in names)


class _Cutter(ast.NodeTransformer):
    """Finds every site; takes out the one that was chosen."""

    def __init__(self, chosen: int | None = None) -> None:
        self.found: list[tuple[str, int, str]] = []
        self._chosen = chosen
        self._function = ""
        self._filters = 0  # inside how many comprehensions: what they drop is only forgotten sooner

    def _site(self, kind: str, node: ast.AST, without: Callable[[], object]) -> object:
        """`node`, or what stands in its place in the chosen mutant."""
        index = len(self.found)
        self.found.append((kind, node.lineno, ast.unparse(node).splitlines()[0]))  # type: ignore[attr-defined]
        return without() if index == self._chosen else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> object:
        outer, self._function = self._function, node.name
        self.generic_visit(node)
        self._function = outer
        return node

    def visit_comprehension(self, node: ast.comprehension) -> object:
        self._filters += 1
        self.generic_visit(node)
        self._filters -= 1
        return node

    def visit_With(self, node: ast.With) -> object:
        self.generic_visit(node)
        for item in list(node.items):
            if _LOCK.search(_name(item.context_expr).lower()):
                others = [other for other in node.items if other is not item]
                found = self._site(
                    "lock",
                    node,
                    lambda others=others: ast.With(others, node.body) if others else list(node.body),
                )
                if found is not node:
                    return found
        return node

    def visit_Expr(self, node: ast.Expr) -> object:
        self.generic_visit(node)
        call = node.value
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            return node
        name = _name(call)
        if _WAIT.fullmatch(name):
            return self._site("wait", node, ast.Pass)
        if name.startswith("check_"):
            return self._site("check", node, ast.Pass)
        if name == "record_stream" or (name == "append" and _name(call.func.value) == "keepers"):
            return self._site("hand-over", node, ast.Pass)
        return node

    def visit_Call(self, node: ast.Call) -> object:
        self.generic_visit(node)
        name = _name(node)
        if not isinstance(node.func, ast.Attribute):
            return node
        if _RECORD.fullmatch(name):
            unrecorded = ast.Name(UNRECORDED, ast.Load())
            return self._site("record", node, lambda: ast.Call(unrecorded, [node], []))
        if name in ("drop", "give_back") and len(node.args) == 2:
            nothing = ast.Constant(None)
            return self._site("hand-over", node, lambda: ast.Call(node.func, [node.args[0], nothing], []))
        if name == "detach" and not node.args and not _on_self(node.func) and _mentions(re.compile("tensor"), node):
            return self._site("probe", node, lambda: node.func.value)
        if name in _NEVER_MOVES:
            return self._site("untouched", node, lambda: ast.Constant(_NEVER_MOVES[name]))
        return node

    def visit_Assign(self, node: ast.Assign) -> object:
        self.generic_visit(node)
        target = node.targets[0]
        if self._function == "__init__" and _on_self(target):
            return node  # a field is born, nothing is handed over
        if isinstance(target, ast.Attribute) and target.attr == "busy":
            return self._site("hand-over", node, ast.Pass)
        if isinstance(target, ast.Attribute) and target.attr == "data":
            kind = "memory" if isinstance(node.value, ast.Constant) else "probe"
            return self._site(kind, node, ast.Pass)
        return node

    def visit_Compare(self, node: ast.Compare) -> object:
        self.generic_visit(node)
        operator = node.ops[0]
        right = node.comparators[0]
        if isinstance(operator, ast.Eq | ast.NotEq) and _mentions(_VERSION, node):
            return self._site("version", node, lambda: ast.Constant(isinstance(operator, ast.Eq)))
        if isinstance(operator, ast.Gt | ast.GtE | ast.Lt | ast.LtE):
            over = isinstance(operator, ast.Gt | ast.GtE)
            if _LIMIT.search(_last(right)):
                return self._site("bound", node, lambda: ast.Constant(not over))
            if _LIMIT.search(_last(node.left)):
                return self._site("bound", node, lambda: ast.Constant(over))
        same = isinstance(operator, ast.Is) and not isinstance(right, ast.Constant)
        if same and not self._filters and _mentions(_STORAGE, node):
            return self._site("identity", node, lambda: ast.Constant(True))
        if isinstance(operator, ast.In) and _name(right) == "fixed":
            return self._site("untouched", node, lambda: ast.Constant(False))
        return node

    def visit_BinOp(self, node: ast.BinOp) -> object:
        self.generic_visit(node)
        if isinstance(node.op, ast.Mod) and _mentions(re.compile("alignment"), node.right):
            return self._site("address", node, lambda: ast.Constant(0))
        if isinstance(node.op, ast.Sub) and _mentions(_VERSION, node.left) and _mentions(_VERSION, node.right):
            return self._site("version", node, lambda: ast.Constant(0))
        return node


def _on_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _last(node: ast.expr) -> str:
    """The name that a side of a comparison is about: `self.budget_bytes` → budget."""
    return re.sub(r"_(bytes|ns)$", "", _name(node))
