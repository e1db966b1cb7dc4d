"""The numbers of the cost model that fit measurements best, and predictions of rows that were not fitted.

Bounded least squares on the logarithm of predicted over measured, with a loss that grows linearly beyond a tenth: a
model that is modelled badly must not bend the numbers of all others. A weak pull towards `START`, round numbers from
datasheets and common knowledge, decides what the rows leave open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from vdnn.costs.numbers import CostNumbers
from vdnn.fidelity.captures import Captures
from vdnn.fidelity.rows import KernelRow, StepRow
from vdnn.fidelity.steps import Kernels, StepSet, measured_floor_ns

__all__ = ["START", "Measured", "fit_numbers", "folds_by_family", "kernel_groups", "predict_kernels"]

F = npt.NDArray[np.float64]
# Number → where the fit starts, and the least and the most that it may become.
RANGES: dict[str, tuple[float, float, float]] = {
    "core_fraction": (0.88, 0.4, 1.1),
    "core_start": (50.0, 5.0, 300.0),
    "fp32_pj_per_flop": (18.0, 4.0, 40.0),
    "tensor_fraction": (0.9, 0.5, 1.25),
    "tensor_half": (5.0, 0.3, 60.0),
    "tensor_start": (30.0, 3.0, 600.0),
    "unhidden": (0.25, 0.01, 0.8),
    "conv_tensor": (0.95, 0.2, 1.1),
    "winograd": (0.7, 0.2, 1.2),
    "core_traffic": (0.6, 0.2, 1.0),
    "winograd_traffic": (0.4, 0.02, 1.0),
    "read_again": (0.065, 0.02, 1.0),
    "conv_others": (4.0, 0.1, 12.0),
    "power_settles_ns": (4e6, 1e5, 1e8),
    "weight_gradient": (0.7, 0.2, 1.5),
    "grouped": (0.6, 0.05, 1.0),
    "layout_change": (0.8, 0.2, 1.0),
    "pointwise": (0.8, 0.3, 1.2),
    "depthwise": (0.2, 0.01, 1.0),
    "depthwise_weight": (0.02, 0.002, 1.0),
    "depthwise_library": (0.1, 0.01, 1.0),
    "depthwise_library_weight": (0.1, 0.002, 1.0),
    "depthwise_taps": (20.0, 0.1, 60.0),
    "attention": (0.55, 0.1, 1.3),
    "stream": (0.92, 0.6, 1.0),
    "batch_norm_backward": (0.4, 0.05, 1.2),
    "layer_norm": (0.8, 0.1, 1.2),
    "layer_norm_backward": (0.4, 0.05, 1.2),
    "softmax": (0.6, 0.1, 1.2),
    "pool_backward": (0.4, 0.02, 1.2),
    "gather": (0.4, 0.02, 1.2),
    "scatter": (0.1, 0.01, 1.2),
    "short_run_bytes": (4.0, 0.3, 100.0),
    "dram_latency_ns": (300.0, 100.0, 800.0),
    "kernel_start": (1.5, 0.2, 6.0),
    "host_view": (0.3, 0.05, 1.0),
    "host_backward": (0.6, 0.2, 2.0),
}
START = CostNumbers(**{name: start for name, (start, _, _) in RANGES.items()})
SCALE = 0.1  # errors beyond it count by their size, no more by their square
PULL = 0.03  # of a number that is e times its start
KERNELS_A_GROUP = 150  # rows of a kind on a GPU that are fitted; the others are judged
TRAINING_WEIGHT = 3.0  # of a training step against a forward: they are fewer, have more kinds of ops, and matter most
KERNELS_WEIGHT = 0.25  # of all kernels together, against all steps


@dataclass(slots=True)
class Measured:
    """Rows with what is needed to predict them."""

    rows: list[StepRow] = field(default_factory=list)
    sets: dict[str, StepSet] = field(default_factory=dict)
    places: list[tuple[str, int]] = field(default_factory=list)  # by row: its GPU's set, and its place there

    @staticmethod
    def of(rows: Sequence[StepRow], captures: Captures, progress: Callable[[str, int, int], None]) -> Measured:
        """Those of the rows that have traces."""
        found = Measured()
        for number, row in enumerate(sorted(rows, key=lambda r: (r.kind, r.model, r.batch, r.image_size))):
            progress(f"read {row.model}", number, len(rows))
            step = captures.shaped(row)
            if step is not None:
                steps = found.sets.setdefault(row.gpu, StepSet(row.gpu))
                found.rows.append(row)
                found.places.append((row.gpu, steps.count))
                steps.add(step)
        return found

    def predicted_ns(
        self, numbers: CostNumbers, chosen: npt.NDArray[np.bool_] | None = None, same_path: bool = False
    ) -> F:
        """The time of each row, or of those chosen; `same_path`: see `StepSet.predicted_ns`."""
        places = [p for i, p in enumerate(self.places) if chosen is None or chosen[i]]
        by_gpu = {gpu: self.sets[gpu].predicted_ns(numbers, same_path) for gpu in {gpu for gpu, _ in places}}
        return np.array([by_gpu[gpu][place] for gpu, place in places])

    @property
    def measured_ns(self) -> F:
        """The measured time of each row."""
        return np.array([row.measured_ns for row in self.rows], dtype=np.float64)


def fit_numbers(
    measured: Measured,
    chosen: npt.NDArray[np.bool_],
    kernels: Sequence[Kernels],
    *,
    start: CostNumbers = START,
    rounds: int = 7,
    progress: Callable[[str], None] = lambda what: None,
) -> CostNumbers:
    """The numbers that fit the chosen steps and the kernels; a number that nothing depends on stays at its start."""
    from scipy.optimize import least_squares

    names = list(RANGES)
    low, high = (np.log([RANGES[name][side] for name in names]) for side in (1, 2))
    origin = np.log([RANGES[name][0] for name in names])
    steps = np.log(measured.measured_ns[chosen])
    kinds = [row.kind for row, wanted in zip(measured.rows, chosen, strict=True) if wanted]
    weights = np.sqrt([TRAINING_WEIGHT if kind == "train" else 1.0 for kind in kinds])
    groups = [(k, floor_of(kernels, k.gpu, k.kind)) for k in kernels]
    rows = max(int(chosen.sum()), 1)
    calls = 0

    def numbers_of(x: F) -> CostNumbers:
        return replace(start, **dict(zip(names, map(float, np.exp(x)), strict=True)))

    def residuals(x: F, near: bool = False) -> F:
        nonlocal calls
        calls += 1
        if calls % 10 == 0:
            progress(f"fit, {calls} evaluations")
        numbers = numbers_of(x)
        found = [PULL * (x - origin)]
        if len(steps):
            found.append(_damped(np.log(measured.predicted_ns(numbers, chosen, near)) - steps) * weights)
        for k, floor in groups:
            error = np.log(k.predicted_ns(numbers, floor)) - np.log(k.measured_ns)
            weight = (KERNELS_WEIGHT * rows if len(steps) else 1000.0) / len(groups) / len(error)
            found.append(_damped(error) * np.sqrt(weight))
        return np.concatenate(found)

    def slopes(x: F) -> F:
        here = residuals(x)
        columns = []
        for i in range(len(x)):
            moved = x.copy()
            moved[i] += 2e-3 if x[i] + 2e-3 < high[i] else -2e-3
            columns.append((residuals(moved, near=True) - here) / (moved[i] - x[i]))
        return np.stack(columns, axis=1)

    first = np.clip(np.log([getattr(start, name) for name in names]), low + 1e-3, high - 1e-3)
    done = least_squares(residuals, first, jac=slopes, bounds=(low, high), max_nfev=rounds, xtol=1e-4, ftol=1e-4)
    return numbers_of(done.x)


def _damped(error: F) -> F:
    """Residuals whose squares are the soft-L1 loss."""
    loss = 2 * SCALE**2 * (np.sqrt(1 + (error / SCALE) ** 2) - 1)
    damped: F = np.sign(error) * np.sqrt(loss)
    return damped


def floor_of(kernels: Sequence[Kernels], gpu: str, kind: str) -> float:
    """The host's time for one kernel measured alone, from the rows given."""
    return measured_floor_ns([k for k in kernels if (k.gpu, k.kind) == (gpu, kind)])


def folds_by_family(rows: Sequence[StepRow], count: int) -> npt.NDArray[np.int64]:
    """For each row its fold. A family is in one fold; folds are of about the same size."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.family] = sizes.get(row.family, 0) + 1
    filled, fold = [0] * count, {}
    for family in sorted(sizes, key=lambda f: (-sizes[f], f)):
        fold[family] = filled.index(min(filled))
        filled[fold[family]] += sizes[family]
    return np.array([fold[row.family] for row in rows], dtype=np.int64)


def predict_kernels(fitted: Sequence[Kernels], judged: Sequence[Kernels], numbers: CostNumbers) -> list[F]:
    """Predicted times of kernels; the host's time is taken from rows that were fitted, of the same GPU and kind."""
    return [k.predicted_ns(numbers, floor_of(fitted, k.gpu, k.kind)) for k in judged]


def kernel_groups(rows: Sequence[KernelRow], seed: int = 0) -> tuple[list[Kernels], list[Kernels]]:
    """Rows by kind and GPU, divided at random into those to fit and those to judge."""
    groups: dict[tuple[str, str], list[KernelRow]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.gpu), []).append(row)
    fitted, judged = [], []
    for key in sorted(groups):
        order = np.random.default_rng(seed).permutation(len(groups[key]))
        few = min(KERNELS_A_GROUP, len(order) // 2)
        fitted.append(Kernels([groups[key][i] for i in order[:few]]))
        judged.append(Kernels([groups[key][i] for i in order[few:]]))
    return fitted, judged


def as_mapping(numbers: CostNumbers) -> Mapping[str, float]:
    """Numbers by name, rounded to what a fit can tell."""
    return {name: float(f"{getattr(numbers, name):.4g}") for name in CostNumbers.__slots__}
