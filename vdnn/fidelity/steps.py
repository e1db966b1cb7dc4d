"""Many measured steps priced at once: each distinct shape one time, so that a fit takes minutes.

A step's time without copies is what `vdnn.sim.run` makes of it, in closed form: with H_i the time at which the host has
issued op i and D_i the device's work from op i on, the last op ends at the largest H_i + D_i.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vdnn.costs.kernel_times import FAMILIES, Columns, Machine
from vdnn.costs.numbers import CostNumbers
from vdnn.costs.shapes import AttentionShape, ConvShape, ProductShape, Shapes, StreamShape, shapes_of
from vdnn.fidelity.rows import KernelRow
from vdnn.values import Hardware, Trace, hardware

__all__ = ["Kernels", "Shaped", "StepSet", "measured_floor_ns"]

F = npt.NDArray[np.float64]
I = npt.NDArray[np.int64]
VIEW, FORWARD, BACKWARD = range(3)


@dataclass(frozen=True, slots=True)
class Shaped:
    """What a step's cost depends on: its distinct ops as shapes by family, and for each op which, and how issued."""

    ops: list[list[tuple[int, Any]]]
    of: list[int]
    host: list[int]

    @staticmethod
    def of_trace(trace: Trace) -> Shaped:
        """Of a trace, which is much larger."""
        shapes = Shapes()
        parts = shapes_of(trace, shapes)
        tables = [list(getattr(shapes, name)) for _, name in FAMILIES]
        distinct = {op: number for number, op in enumerate(dict.fromkeys(parts))}
        ops = [[(family, tables[family][number]) for family, number in op] for op in distinct]
        issued = [VIEW if o.kernel == "view" else BACKWARD if o.phase == "backward" else FORWARD for o in trace.ops]
        return Shaped(ops, [distinct[op] for op in parts], issued)

    def encoded(self) -> str:
        """As JSON."""
        return json.dumps([self.ops, self.of, self.host], separators=(",", ":"))

    @staticmethod
    def decoded(text: str) -> Shaped:
        """From JSON."""
        ops, of, host = json.loads(text)
        kinds = (ProductShape, ConvShape, AttentionShape, StreamShape)
        return Shaped([[(family, kinds[family](*shape)) for family, shape in op] for op in ops], of, host)


class StepSet:
    """Steps measured on one GPU; a step is known by its place in the order of `add`."""

    def __init__(self, gpu: str) -> None:
        self.gpu = gpu
        self.shapes = Shapes()
        self.count = 0
        self._ops: dict[tuple[tuple[int, int], ...], int] = {}  # what ops are made of → number
        self._of: list[I] = []  # by step: for each op its number
        self._host: list[I] = []  # by step: for each op how the host issues it
        self._kernels: I | None = None
        self._path: tuple[F, Any] | None = None
        self._uses: dict[int, tuple[str, ...]] = {}
        self._priced: dict[tuple[object, ...], F] = {}
        self._columns: dict[int, Columns] = {}

    def add(self, step: Shaped) -> None:
        """One more step."""
        families: tuple[dict[Any, int], ...] = tuple(getattr(self.shapes, name) for _, name in FAMILIES)
        numbers = []
        for parts in step.ops:
            op = tuple((family, families[family].setdefault(shape, len(families[family]))) for family, shape in parts)
            numbers.append(self._ops.setdefault(op, len(self._ops)))
        self._of.append(np.array(numbers, dtype=np.int64)[np.array(step.of, dtype=np.int64)])
        self._host.append(np.array(step.host, dtype=np.int64))
        self.count += 1
        self._kernels = self._path = None

    def predicted_ns(self, numbers: CostNumbers, same_path: bool = False) -> F:
        """Time of each step, in ns.

        `same_path`: the host issues and the device computes the ops that they did on the last call's longest path. Near
        its numbers that is exact to the first order, and much quicker.
        """
        if not self.count:
            return np.empty(0)
        if self._kernels is None:
            sizes = [len(getattr(self.shapes, name)) for _, name in FAMILIES]
            offsets = np.cumsum([1, *sizes])  # the first price is that of no kernel
            width = max(map(len, self._ops), default=0)
            self._kernels = np.array(
                [[*(offsets[f] + n for f, n in op), *[0] * (width - len(op))] for op in self._ops], dtype=np.int64
            )
        prices = np.concatenate([[0.0], *(self._price(family, numbers) for family in range(len(FAMILIES)))])
        each = prices[self._kernels].sum(axis=1)
        issue = np.array([numbers.host_view, 1.0, numbers.host_backward]) * hardware(self.gpu).launch_ns
        if not same_path or self._path is None:
            self._path = self._longest(each, issue)
        issued, computed = self._path
        found: F = issued @ issue + computed @ each
        return found

    def _longest(self, each: F, issue: F) -> tuple[F, Any]:
        """By step: the ops of each kind that the host issues until the device waits no more, and what that computes."""
        from scipy.sparse import csr_array

        issued, columns, counts, ends = np.zeros((self.count, 3)), [], [], [0]
        for step, (of, host) in enumerate(zip(self._of, self._host, strict=True)):
            work = each[of]
            at = np.cumsum(issue[host])
            left = np.cumsum(work[::-1])[::-1]
            last = int(np.argmax(at + left))
            device = at[last] + left[last] > at[-1]  # else the device is done before the host
            issued[step] = np.bincount(host[: last + 1] if device else host, minlength=3)
            ops, number = np.unique(of[last:] if device else of[:0], return_counts=True)
            columns.append(ops)
            counts.append(number)
            ends.append(ends[-1] + len(ops))
        table = (np.concatenate(counts).astype(np.float64), np.concatenate(columns), np.array(ends))
        return issued, csr_array(table, shape=(self.count, len(each)))

    def _price(self, family: int, numbers: CostNumbers) -> F:
        """Times of the shapes of a family; kept, since a fit changes one number at a time."""
        used = self._uses.get(family)
        if used is not None:
            key = (family, len(self._ops), *(getattr(numbers, name) for name in used))
            if key in self._priced:
                return self._priced[key]
        formula, name = FAMILIES[family]
        noted: Any = _Noted(numbers)
        shapes = self._columns.get(family)
        if shapes is None or len(shapes) != len(getattr(self.shapes, name)):
            shapes = self._columns[family] = Columns(getattr(self.shapes, name))
        priced = formula(shapes, Machine.of(hardware(self.gpu), noted), noted)
        used = self._uses[family] = tuple(sorted(noted.asked))
        if len(self._priced) > 200:
            self._priced.clear()
        self._priced[family, len(self._ops), *(getattr(numbers, name) for name in used)] = priced
        return priced


class _Noted:
    """Numbers that note which of them a formula asks for."""

    def __init__(self, numbers: CostNumbers) -> None:
        self._numbers = numbers
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._numbers, name)
        self.asked.add(name)
        return found


class Kernels:
    """Measured kernels of one kind on one GPU."""

    def __init__(self, rows: Sequence[KernelRow]) -> None:
        self.kind, self.gpu = rows[0].kind, rows[0].gpu
        self.measured_ns = np.array([row.measured_ns for row in rows], dtype=np.float64)
        self._shapes = Columns(row.shape for row in rows)
        self._family = {"linear": 0, "bmm": 0, "conv": 1}.get(self.kind, 3)
        self._uses: tuple[str, ...] | None = None
        self._priced: dict[tuple[float, ...], F] = {}

    def predicted_ns(self, numbers: CostNumbers, floor_ns: float) -> F:
        """Time of each kernel, measured alone: no less than the host needs to issue it (`measured_floor_ns`)."""
        key = tuple(getattr(numbers, name) for name in self._uses or ())
        if self._uses is None or key not in self._priced:
            noted: Any = _Noted(numbers)
            gpu = hardware_without_tf32(self.gpu)  # NeuSight ran without TF32
            formula = FAMILIES[self._family][0]
            lasting, brief = (Machine.of(gpu, noted, lasting=long) for long in (True, False))
            priced = formula(self._shapes, lasting, noted)
            if lasting.cores < brief.cores:
                # a kernel measured alone runs some dozen times: the board lowers its clock only where they take long
                free = formula(self._shapes, brief, noted)
                priced = free + (priced - free) * priced / (priced + noted.power_settles_ns)
            self._uses = tuple(sorted(noted.asked))
            if len(self._priced) > 50:
                self._priced.clear()
            key = tuple(getattr(numbers, name) for name in self._uses)
            self._priced[key] = priced
        # the events around a kernel that runs alone add about half of what the host needs to issue it
        return np.maximum(self._priced[key] + floor_ns / 2, floor_ns)


def hardware_without_tf32(gpu: str) -> Hardware:
    """The preset, with fp32 products and convolutions on the cores."""
    machine = hardware(gpu)
    return replace(machine, peaks=tuple(p for p in machine.peaks if p.dtype != "tf32"))


def measured_floor_ns(kernels: Sequence[Kernels]) -> float:
    """What a kernel measured alone takes at least, on the host of these rows: their fifth percentile.

    A kernel between two events is as long as the host needs to issue it, if that is longer. This is a property of the
    host and of how was measured, not of the GPU.
    """
    return float(np.quantile(np.concatenate([k.measured_ns for k in kernels]), 0.05))
