"""Reports as text: what `rows` and `summaries` computed, as tables for a terminal.

Units are in the headers, "--" stands for what is not known, and nothing is cut off. Every function returns a
rich renderable: print it on a `rich.console.Console`, or turn it into a string with `as_text`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group
from rich.text import Text

from vdnn.reporting.rows import LEVELS, Comparison, by_category, comparisons, peak_of, peak_parts
from vdnn.reporting.scale import NOTHING, Scale, byte_scale, time_scale
from vdnn.reporting.sheet import Column, Sheet, as_text, stacked
from vdnn.reporting.summaries import PlanRow, TraceSummary, hardware_row, plan_rows, summarise
from vdnn.units import format_bytes, format_ns
from vdnn.values import Hardware, Plan, RunResult, Stall, Trace

__all__ = [
    "as_text",
    "batches_table",
    "hardware_table",
    "plan_report",
    "result_report",
    "results_table",
    "trace_report",
]


def _ratio(number: float | None) -> str:
    return NOTHING if number is None else f"{number:.2f}×"


def _percent(number: float | None, sign: bool = False) -> str:
    return NOTHING if number is None else f"{number:{'+' if sign and round(number, 1) else ''}.1f}"


def _yes_no(answer: bool | None) -> str:
    return NOTHING if answer is None else "yes" if answer else "no"


# -- several results -----------------------------------------------------------------------------


def results_table(results: Sequence[RunResult], baseline: RunResult | None = None) -> Sheet:
    """Runs side by side: memory, time, and both against the run without offload.

    What all runs share (model, batch, GPU, …) is in the title; what differs has a column.
    """
    pairs = comparisons(results, baseline)
    shared, own = [], []
    for name, shown in _SETTINGS.items():
        values = {getattr(r, name) for r in results}
        if len(values) == 1:
            value = values.pop()
            shared.append(f"batch {value}" if name == "batch" else str(value))
        elif name != "policy":
            own.append((name, shown))
    columns = [Column("policy", words=True)]
    columns += [Column(shown, words=name != "batch") for name, shown in own]
    figures = _figures(pairs)
    columns += [Column(header) for header, _ in figures]
    rows = []
    for i, pair in enumerate(pairs):
        policy = pair.result.policy + (" (baseline)" if pair.is_baseline else "")
        settings = [str(getattr(pair.result, name)) for name, _ in own]
        rows.append((policy, *settings, *(cells[i] for _, cells in figures)))
    marked = frozenset(i for i, pair in enumerate(pairs) if pair.is_baseline)
    return Sheet(" · ".join(shared), tuple(columns), tuple(rows), _remarks(pairs), marked, 1 + len(own))


_SETTINGS = {
    "model": "model",
    "batch": "batch",
    "gpu": "GPU",
    "precision": "precision",
    "policy": "policy",
    "source": "source",
}


def _figures(pairs: Sequence[Comparison]) -> list[tuple[str, list[str]]]:
    """Headers and cells of the number columns; a level of memory that no run knows has none."""
    results = [pair.result for pair in pairs]
    size = byte_scale(peak_of(r, level) for r in results for level in LEVELS)
    moved = byte_scale(r.offloaded_bytes for r in results)
    time = time_scale(r.iteration_time_ns for r in results)
    found: list[tuple[str, list[str]]] = []
    for level in LEVELS:
        if level == "requested" or any(peak_of(r, level) is not None for r in results):
            found.append((f"peak\n{level}\n[{size.unit}]", [size.text(peak_of(r, level)) for r in results]))
    found.append(("fits\n\n", [_yes_no(r.fits) for r in results]))
    found.append(("saved\n\n[%]", [_percent(p.saving_percent) for p in pairs]))
    found.append((f"iteration\n\n[{time.unit}]", [time.text(r.iteration_time_ns) for r in results]))
    found.append(("slowdown\n\n", [_ratio(p.slowdown) for p in pairs]))
    found.append((f"stalls\n\n[{time.unit}]", [time.text(r.stall_ns) for r in results]))
    found.append((f"offloaded\n\n[{moved.unit}]", [moved.text(r.offloaded_bytes) for r in results]))
    found.append((f"fetched\n\n[{moved.unit}]", [moved.text(r.prefetched_bytes) for r in results]))
    found.append((f"host\npeak\n[{moved.unit}]", [moved.text(r.host_peak_bytes) for r in results]))
    return found


def _remarks(pairs: Sequence[Comparison]) -> tuple[str, ...]:
    remarks = []
    if any(p.baseline is not None and p.baseline.fits is False for p in pairs):
        remarks.append("A baseline that does not fit is shown as if the GPU had unbounded memory.")
    levels = {p.saving_of for p in pairs if p.saving_of is not None} - {"requested"}
    if levels:
        remarks.append(f"Saved: of {' or '.join(sorted(levels))} memory where requested is not known.")
    for r in (p.result for p in pairs):
        if r.iteration_time_ns and r.iteration_time_low_ns is not None and r.iteration_time_high_ns is not None:
            low, high = (t / r.iteration_time_ns for t in (r.iteration_time_low_ns, r.iteration_time_high_ns))
            remark = (
                f"Measured iterations on {r.gpu} are expected between {low:.2f} and {high:.2f} times the predicted."
            )
            remarks += [remark] if remark not in remarks else []
    for note in dict.fromkeys(note for p in pairs for note in p.result.notes):
        ours = [p.result for p in pairs if note in p.result.notes]
        policies = dict.fromkeys(r.policy for r in ours)
        everywhere = all(note in p.result.notes for p in pairs)
        whose = ", ".join(policies)
        told = note if note.startswith(f"{whose} ") else f"{whose}: {note}"
        remarks.append(note[0].upper() + note[1:] + "." if everywhere else told)
    return tuple(remarks)


# -- one result ----------------------------------------------------------------------------------


def result_report(result: RunResult, baseline: RunResult | None = None, top: int = 8) -> Group:
    """One run on one screen: its numbers, what fills its peak, what offload cannot lower, its longest stalls."""
    parts = [_numbers(result, baseline)]
    if result.peak_items:
        parts += [_filling(result), _largest(result, top)]
    if result.timeline is not None and result.timeline.stalls:
        parts.append(_stalls(result.timeline.stalls, top))
    return stacked(*parts)


def _numbers(result: RunResult, baseline: RunResult | None) -> Sheet:
    pair = comparisons([result], baseline)[0]
    rows: list[tuple[str, str, str]] = []

    def line(name: str, own: str, other: str) -> None:
        rows.append((name, own, other if baseline is not None else NOTHING))

    for level in LEVELS:
        other = peak_of(baseline, level) if baseline is not None else None
        line(f"peak {level}", format_bytes(peak_of(result, level)), format_bytes(other))
    for name, label in (("iteration", "iteration time"), ("forward", "  forward"), ("backward", "  backward")):
        other = getattr(baseline, f"{name}_time_ns") if baseline is not None else None
        line(label, format_ns(getattr(result, f"{name}_time_ns")), format_ns(other))
        if name == "iteration":
            line("  expected between", _interval(result), _interval(baseline))
    line("stalls", format_ns(result.stall_ns), format_ns(baseline.stall_ns if baseline is not None else None))
    for name, label in (
        ("offloaded_bytes", "offloaded"),
        ("prefetched_bytes", "fetched"),
        ("host_peak_bytes", "host peak"),
    ):
        other = getattr(baseline, name) if baseline is not None else None
        line(label, format_bytes(getattr(result, name)), format_bytes(other))
    line("fits", _yes_no(result.fits), _yes_no(baseline.fits if baseline is not None else None))
    notes = []
    if pair.saving_bytes is not None and not pair.is_baseline:
        saving = f"{format_bytes(pair.saving_bytes)} ({_percent(pair.saving_percent)} %) of {pair.saving_of} memory"
        notes.append(f"Saves {saving}, slowdown {_ratio(pair.slowdown)}.")
    if result.peak_at:
        notes.append(f"Peak at {result.peak_at}.")
    notes += result.notes
    title = f"{result.model} · batch {result.batch} · {result.precision} · {result.gpu} · {result.source}"
    columns = (Column("", words=True), Column(result.policy), Column("baseline"))
    shown = [row for row in rows if baseline is not None or row[1] != NOTHING or row[0].startswith("peak req")]
    if baseline is None:
        return Sheet(title, columns[:2], tuple(row[:2] for row in shown), tuple(notes))
    return Sheet(title, columns, tuple(shown), tuple(notes))


def _interval(result: RunResult | None) -> str:
    if result is None or result.iteration_time_low_ns is None or result.iteration_time_high_ns is None:
        return NOTHING
    return f"{format_ns(result.iteration_time_low_ns)} and {format_ns(result.iteration_time_high_ns)}"


def _filling(result: RunResult) -> Sheet:
    parts = by_category(result)
    size = byte_scale(p.nbytes for p in parts)
    total = sum(p.nbytes for p in parts)
    fixed = sum(p.nbytes for p in parts if not p.lowered)
    rows = [(p.label, size.text(p.nbytes), _percent(p.percent), _yes_no(p.lowered), p.why) for p in parts]
    rows.append(("total", size.text(total), _percent(100.0 if total else 0.0), "", ""))
    columns = (
        Column("what fills the peak", words=True),
        Column(f"[{size.unit}]"),
        Column("[%]"),
        Column("offload\nlowers it"),
        Column("why not", words=True),
    )
    notes = (f"Offload cannot lower {format_bytes(fixed)} of these {format_bytes(total)}.",)
    return Sheet("", columns, tuple(rows), notes, frozenset({len(rows) - 1}))


def _largest(result: RunResult, top: int) -> Sheet:
    parts = [p for p in peak_parts(result) if p.module]
    size = byte_scale(p.nbytes for p in parts)
    rows = [(p.module, p.label, size.text(p.nbytes), _percent(p.percent)) for p in parts[:top]]
    rest = parts[top:]
    if rest:
        rest_percent = sum(p.percent for p in rest)
        rows.append((f"{len(rest)} more", "", size.text(sum(p.nbytes for p in rest)), _percent(rest_percent)))
    columns = (
        Column("largest at the peak", words=True),
        Column("category", words=True),
        Column(f"[{size.unit}]"),
        Column("[%]"),
    )
    return Sheet("", columns, tuple(rows))


def _stalls(stalls: Sequence[Stall], top: int) -> Sheet:
    waits = sorted(stalls, key=lambda s: (s.start_ns - s.end_ns, s.start_ns))
    time = time_scale(s.end_ns - s.start_ns for s in waits)
    rows: list[tuple[str, ...]] = []
    for s in waits[:top]:
        rows.append((s.cause, s.stream, s.what, time.text(s.start_ns), time.text(s.end_ns - s.start_ns)))
    if waits[top:]:
        rest = sum(s.end_ns - s.start_ns for s in waits[top:])
        rows.append((f"{len(waits) - top} more", "", "", "", time.text(rest)))
    columns = (
        Column("longest stalls", words=True),
        Column("stream", words=True),
        Column("waits for", words=True),
        Column(f"from\n[{time.unit}]"),
        Column(f"lasts\n[{time.unit}]"),
    )
    return Sheet("", columns, tuple(rows))


def batches_table(results: Sequence[RunResult]) -> Sheet:
    """The largest batch that fits by policy, with its peak and its rate."""
    levels = [level for level in LEVELS if any(peak_of(r, level) is not None for r in results)]
    size = byte_scale(peak_of(r, level) for r in results for level in levels)
    time = time_scale(r.iteration_time_ns for r in results)
    rows = [
        (
            r.policy,
            str(r.batch),
            *(size.text(peak_of(r, level)) for level in levels),
            time.text(r.iteration_time_ns),
            NOTHING if not r.iteration_time_ns else f"{r.batch * 1e9 / r.iteration_time_ns:.1f}",
        )
        for r in results
    ]
    columns = (
        Column("policy", words=True),
        Column("largest\nbatch\n"),
        *(Column(f"peak\n{level}\n[{size.unit}]") for level in levels),
        Column(f"iteration\n\n[{time.unit}]"),
        Column("samples\n\n[1/s]"),
    )
    first = results[0] if results else None
    title = f"{first.model} · {first.gpu} · {first.precision} · {first.source}" if first else ""
    return Sheet(title, columns, tuple(rows))


# -- plan ----------------------------------------------------------------------------------------


def plan_report(plan: Plan, top: int | None = None, least_bytes: int = 1 << 20) -> Sheet:
    """What a plan does with each storage; with `top`, the largest alone, and the rest in one line.

    So are those that are kept and smaller than `least_bytes`, if there are others.
    """
    rows = plan_rows(plan)
    small = [r for r in rows if r.action == "keep" and r.storage_bytes < least_bytes]
    if len(small) == len(rows):
        small = []
    shown = [r for r in rows if r not in small]
    if top is not None and len(rows) > top:
        small = []
        kept = {id(r) for r in sorted(rows, key=lambda r: -r.storage_bytes)[:top]}
        shown = [r for r in rows if id(r) in kept]
    size = byte_scale(r.storage_bytes for r in rows)
    cells = [_plan_cells(r, size) for r in shown]
    if len(shown) < len(rows):
        rest = size.text(sum(r.storage_bytes for r in rows) - sum(r.storage_bytes for r in shown))
        action, why = ("keep", f"each below {format_bytes(least_bytes)}") if small else ("", "")
        cells.append((f"{len(rows) - len(shown)} more", action, rest, "", "", why))
    moved = [r for r in rows if r.moved_bytes]
    kept_bytes = sum(r.storage_bytes for r in rows if not r.moved_bytes)
    notes = [
        f"{len(moved)} storages, {format_bytes(plan.offloaded_bytes)}, are offloaded; "
        f"{len(rows) - len(moved)}, {format_bytes(kept_bytes)}, are kept. "
        f"Saved tensors that the plan does not name: {plan.default}."
    ]
    if plan.budget_bytes is not None:
        notes.append(f"Budget: {format_bytes(plan.budget_bytes)}.")
    columns = (
        Column("saved tensor", words=True),
        Column("action", words=True),
        Column(f"storage\n[{size.unit}]"),
        Column("released at", words=True),
        Column("prefetched at", words=True),
        Column("why", words=True),
    )
    title = f"{plan.policy} · {plan.model} · batch {plan.batch} · {plan.device}"
    return Sheet(title, columns, tuple(cells), (*notes, *plan.notes))


def _plan_cells(row: PlanRow, size: Scale) -> tuple[str, ...]:
    prefetch = row.prefetch_at or ("on demand" if row.moved_bytes else NOTHING)
    why = row.why or (f"waits at {row.wait_at}" if row.wait_at else NOTHING)
    return (row.saved, row.action, size.text(row.storage_bytes), row.release_at or NOTHING, prefetch, why)


# -- trace and hardware --------------------------------------------------------------------------


def trace_report(trace: Trace | TraceSummary, top: int = 10) -> Group:
    """A training step on one screen: ops, storages, saved against unique bytes, the largest feature maps."""
    found = trace if isinstance(trace, TraceSummary) else summarise(trace)
    saved = f"{format_bytes(found.saved_bytes)} in {found.saved_tensors} tensors"
    if found.unique_bytes:
        saved += f", {found.saved_bytes / found.unique_bytes:.2f} × the unique bytes"
    numbers = [
        ("ops", f"{found.forward_ops} forward, {found.backward_ops} backward, {found.optimizer_ops} optimizer"),
        ("flops", f"{found.flops / 1e12:.3f} T"),
        ("storages", str(found.storages)),
        ("saved for backward", saved),
        ("  unique bytes", f"{format_bytes(found.unique_bytes)} in {found.saved_storages} storages"),
        ("  held by others too", format_bytes(found.held_bytes)),
        *((f"resident: {name.replace('_', ' ')}", format_bytes(nbytes)) for name, nbytes in found.categories),
    ]
    title = f"{found.model} · batch {found.batch} · {found.precision} · optimizer {found.optimizer} · {found.device}"
    first = Sheet(title, (Column("", words=True), Column("", words=True)), tuple(numbers), found.corrections)
    size = byte_scale(m.nbytes for m in found.modules)
    rows = [(m.module, m.type, str(m.storages), size.text(m.nbytes), _percent(m.percent)) for m in found.modules[:top]]
    rest = found.modules[top:]
    if rest:
        total, percent = sum(m.nbytes for m in rest), sum(m.percent for m in rest)
        rows.append((f"{len(rest)} more", "", str(sum(m.storages for m in rest)), size.text(total), _percent(percent)))
    columns = (
        Column("largest feature maps", words=True),
        Column("type", words=True),
        Column("storages"),
        Column(f"[{size.unit}]"),
        Column("[%]"),
    )
    return stacked(first, Sheet("", columns, tuple(rows))) if rows else Group(first, Text(""))


def hardware_table(machines: Iterable[Hardware]) -> Sheet:
    """GPUs side by side: memory, arithmetic, DRAM, and the link that offload lives on."""
    found = [hardware_row(machine) for machine in machines]
    rows = [
        (
            r["id"],
            r["name"].removeprefix("NVIDIA "),
            f"{r['memory_bytes'] / 2**30:.1f}",
            f"{r['available_bytes'] / 2**30:.1f}",
            f"{r['float32_flops_per_s'] / 1e12:.1f}",
            f"{r['float16_flops_per_s'] / 1e12:.1f}",
            *(f"{r[n] / 1e9:.1f}" for n in ("dram_bytes_per_s", "d2h_bytes_per_s", "h2d_bytes_per_s")),
            f"{r['duplex_bytes_per_s'] / 1e9:.1f}",
        )
        for r in found
    ]
    columns = (
        Column("id", words=True),
        Column("GPU", words=True),
        Column("total\n[GiB]"),
        Column("usable\n[GiB]"),
        Column("fp32\n[Tflop/s]"),
        Column("fp16\n[Tflop/s]"),
        Column("DRAM\n[GB/s]"),
        Column("D2H\n[GB/s]"),
        Column("H2D\n[GB/s]"),
        Column("both\n[GB/s]"),
    )
    return Sheet("", columns, tuple(rows))
