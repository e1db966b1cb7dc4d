"""What an experiment came to: tables and figures, made from the files under `results/` alone.

results/<name>/README.md       title, tables, figures
               results.json    every run as a row
               <figure>.png
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vdnn.errors import EngineError, UsageError
from vdnn.experiment.bandwidth import draw_sweep
from vdnn.experiment.cpu import cpu_rows, draw_cpu
from vdnn.experiment.extra import extras_of
from vdnn.experiment.frontier_page import draw_frontier
from vdnn.experiment.node import draw_node
from vdnn.experiment.runner import Files
from vdnn.experiment.spec import Case, Experiment, Figure, Section
from vdnn.fidelity.page import fidelity_lines, readme_lines
from vdnn.reporting import as_text, predictions_table, result_rows, results_table
from vdnn.reproduction import readme_table, write_figures
from vdnn.values import Plan, RunResult, Trace, load

__all__ = ["write_page"]

WIDTH = 120


def write_page(experiment: Experiment, folder: Path) -> str:
    """Write page, rows and figures of an experiment that has run; returns the tables as text.

    Raises:
        FormatError: a case has no result, or a damaged one.
        EngineError: of real steps, some tensor was not equal to that without offload.
    """
    files = Files(folder)
    results = {case: files.read(case) for case in experiment.cases}
    lines = [f"# {experiment.title}", "", *_paragraph(experiment.text)]
    if results:
        lines += [_origin(results.values()), ""]
    shown = []
    if experiment.networks:
        runs = [extra.path for extra in extras_of(experiment, folder)[: len(experiment.networks)]]
        lines += write_figures(folder, runs)
        shown.append(readme_table(folder) + "\n")
    for section in experiment.sections:
        lines += [f"## {section.title}", "", *_paragraph(section.text)]
        for table in _tables(section, results, files):
            lines += ["```", *table.rstrip().splitlines(), "```", ""]
            shown.append(table)
    for figure in experiment.figures:
        _draw(figure, results, files, folder / figure.file)
        lines += [f"![{figure.caption or figure.kind}]({figure.file})", "", *_paragraph(figure.caption)]
    for sweep in experiment.sweeps:
        lines += draw_sweep(sweep, folder)
    for frontier in experiment.frontiers:
        lines += draw_frontier(frontier, folder)
    for nodes in experiment.nodes:
        lines += draw_node(nodes, folder)
    rows = result_rows(list(results.values()))
    if experiment.cpu is not None:
        rows += cpu_rows(experiment.cpu, folder)
        page = draw_cpu(experiment.cpu, folder)
        lines += page
        shown.append("\n".join(page) + "\n")
    if experiment.fidelity:
        page = fidelity_lines(folder)
        lines += page
        shown.append("\n".join(readme_lines(folder)) + "\n")
    (folder / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "README.md").write_text("\n".join(lines).rstrip() + "\n")
    wrong = next((r for r in results.values() if r.exact is False), None)
    if wrong is not None:
        raise EngineError(f"{wrong.model} under {wrong.policy}: {wrong.notes[0]}")
    return "\n".join(shown)


def _paragraph(text: str) -> list[str]:
    return [text.strip(), ""] if text.strip() else []


def _origin(results: Iterable[RunResult]) -> str:
    origins = {(r.provenance.command, r.provenance.vdnn, r.provenance.commit[:10]) for r in results}
    made = "; ".join(f"`{command}`, vdnn {version}, commit {commit or '?'}" for command, version, commit in origins)
    return f"Made by {made}. Each number's file is under `runs/`; nothing here is edited by hand."


def _tables(section: Section, results: dict[Case, RunResult], files: Files) -> list[str]:
    if section.cases[0].kind == "run":
        pairs = []
        for case in section.cases:
            predicted = load(files.predicted(case), "result")
            assert isinstance(predicted, RunResult)
            pairs.append((predicted, results[case]))
        return [as_text(predictions_table(pairs), width=WIDTH)]
    tables: dict[tuple[str, str], list[RunResult]] = {}
    for case in section.cases:
        tables.setdefault((case.model, case.gpu), []).append(results[case])
    return [as_text(results_table(found), width=WIDTH) for found in tables.values()]


# -- figures -------------------------------------------------------------------------------------


def _draw(figure: Figure, results: dict[Case, RunResult], files: Files, path: Path) -> None:
    from vdnn.reporting import plots

    chosen = {case: result for case, result in results.items() if figure.shows(result)}
    if figure.kind == "policies":
        drawn: Any = plots.policies_figure(list(chosen.values()))
    elif figure.kind == "prediction":
        pairs = []
        for case, result in chosen.items():
            if case.kind == "run":
                predicted = load(files.predicted(case), "result")
                assert isinstance(predicted, RunResult)
                pairs.append((predicted, result))
        drawn = plots.prediction_figure(pairs)
    else:
        if len(chosen) != 1:
            raise UsageError(f"figure {figure.file} shows one run, but selects {len(chosen)}: select more closely")
        ((case, result),) = chosen.items()
        drawn = _draw_one(figure.kind, case, result, results, files)
    plots.save_figure(drawn, path)


def _draw_one(kind: str, case: Case, result: RunResult, results: dict[Case, RunResult], files: Files) -> Any:
    from vdnn.reporting import plots
    from vdnn.reporting.rows import baseline_of
    from vdnn.values import hardware

    if kind == "streams":
        return plots.streams_figure(result)
    if kind == "layers":
        plan, trace = load(files.plan(case), "plan"), load(files.trace(case), "trace")
        assert isinstance(plan, Plan)
        assert isinstance(trace, Trace)
        return plots.layers_figure(plan, trace)
    return plots.memory_figure(
        result, baseline_of(result, results.values()), capacity_bytes=hardware(case.gpu).available_bytes
    )
