"""Runs the cases of an experiment that have no file yet.

    results/<name>/runs/<case>.json                what came of it
                        <case>.predicted.json      of real steps: what was predicted
                        <case>.timeline.json.gz    where a figure shows it, and so for .trace and .plan

A file is written when its case is done, so an experiment that was broken off goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vdnn import api, trace_cache
from vdnn.experiment.extra import extras_of
from vdnn.experiment.spec import SINGLE, Case, Experiment, iter_steps
from vdnn.models import Work
from vdnn.policies import model_options
from vdnn.reporting import provenance
from vdnn.values import Plan, RunResult, Timeline, Trace, load, save
from vdnn.values import hardware as named_hardware

__all__ = ["Files", "run_missing"]


@dataclass(frozen=True, slots=True)
class Files:
    """Where a case's files are, under the folder of the experiment's results."""

    folder: Path

    def result(self, case: Case) -> Path:
        return self.folder / "runs" / f"{case.slug}.json"

    def predicted(self, case: Case) -> Path:
        return self.folder / "runs" / f"{case.slug}.predicted.json"

    def timeline(self, case: Case) -> Path:
        return self.folder / "runs" / f"{case.slug}.timeline.json.gz"

    def trace(self, case: Case) -> Path:
        return self.folder / "runs" / f"{case.slug}.trace.json.gz"

    def plan(self, case: Case) -> Path:
        return self.folder / "runs" / f"{case.slug}.plan.json.gz"

    def read(self, case: Case) -> RunResult:
        """The result of a case, with its timeline where that was kept.

        Raises:
            FormatError: it has none, or a damaged one.
        """
        result = load(self.result(case), "result")
        assert isinstance(result, RunResult)
        if self.timeline(case).exists():
            timeline = load(self.timeline(case), "timeline")
            assert isinstance(timeline, Timeline)
            result = replace(result, timeline=timeline)
        return result


class _Runner:
    def __init__(self, experiment: Experiment, folder: Path, progress: Callable[[str], None]) -> None:
        self.experiment = experiment
        self.files = Files(folder)
        self.progress = progress

    def step(self, cases: Sequence[Case]) -> None:
        """Cases of one training step: captured once, and once more for policies that recompute."""
        first = cases[0]
        place, device = "", "cuda"
        if first.kind == "run":
            from vdnn.training import find_place

            place = find_place(first.device)
            device = "cuda" if place == "cuda" else "cpu"
        made: dict[tuple[tuple[str, str], ...], tuple[Work, Trace]] = {}
        captured: dict[Case, tuple[Work, Trace]] = {}
        for case in cases:
            extra = tuple(sorted(model_options(case.policy).items()))
            if extra not in made:
                made[extra] = self._capture(case, {**dict(case.options), **dict(extra)}, device)
            captured[case] = made[extra]
        if first.kind == "simulate":
            for case in cases:
                self._simulate(case, captured[case][1])
            return
        groups: dict[tuple[object, ...], list[Case]] = {}
        for case in cases:
            groups.setdefault((case.gpu, case.policy_options, case.steps, case.seed), []).append(case)
        for group in groups.values():
            self._run({case: captured[case] for case in group}, place)

    def _capture(self, case: Case, options: dict[str, object], device: str) -> tuple[Work, Trace]:
        work = api.load(case.model, case.batch, **options)
        self.progress(f"capture {work}")
        key = trace_cache.key_of(case.model, str(case.batch), options, case.precision, case.optimizer, device)
        trace = trace_cache.known(key)
        if trace is None:
            trace = api.capture(work, precision=case.precision, optimizer=case.optimizer, device=device)
            trace_cache.keep(key, trace)
        return work, trace

    def _simulate(self, case: Case, trace: Trace) -> None:
        self.progress(f"simulate {case.model} {case.batch} {case.gpu} {case.policy}")
        plan = self._plan(case, trace)
        options = dict(case.policy_options)
        limit, regime = options.get("budget_bytes"), options.get("regime", "pytorch")
        result = api.simulate(trace, plan, case.gpu, memory_limit=limit, timeline=True, regime=regime)
        self._keep(case, replace(result, provenance=provenance(torch=trace.torch)), trace, plan)

    def _run(self, cases: Mapping[Case, tuple[Work, Trace]], place: str) -> None:
        from vdnn.training import run_policies

        ordered = sorted(cases, key=lambda case: case.policy != "none")  # the first is the baseline
        plans = {case: self._plan(case, cases[case][1]) if case.policy != "none" else None for case in ordered}
        first = ordered[0]

        def progress(policy: str, step: int) -> None:
            self.progress(f"train {cases[first][0]} {policy}: step {step} of {first.steps}")

        runs = run_policies(
            [(*cases[case], plans[case]) for case in ordered],
            named_hardware(first.gpu),
            place,
            steps=first.steps,
            seed=first.seed,
            progress=progress,
        )
        for case, run in zip(ordered, runs, strict=True):
            save(run.predicted, self.files.predicted(case))
            self._keep(case, run.measured, cases[case][1], plans[case])

    def _plan(self, case: Case, trace: Trace) -> Plan:
        return api.plan(trace, case.gpu, case.policy, **dict(case.policy_options))

    def _keep(self, case: Case, result: RunResult, trace: Trace, plan: Plan | None) -> None:
        """Write a case's files, its result last: that is the sign that the case is done."""
        wanted = {f.kind for f in self.experiment.figures if f.kind in SINGLE and _shown_with(f.select, case, f)}
        if wanted - {"layers"} and result.timeline is not None:
            save(result.timeline, self.files.timeline(case))
        if "layers" in wanted and plan is not None and case.policy != "none":
            save(trace, self.files.trace(case))
            save(plan, self.files.plan(case))
        save(replace(result, timeline=None), self.files.result(case))


def _shown_with(select: Sequence[tuple[str, object]], case: Case, figure: object) -> bool:
    """Whether a figure of one run shows the case: itself, or as the baseline of what it shows."""
    wanted = dict(select)
    if case.policy == "none":
        wanted.pop("policy", None)
    return all(getattr(case, name, value) == value for name, value in wanted.items())


def run_missing(
    experiment: Experiment,
    folder: Path,
    *,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[int, int]:
    """Run what has no result yet (with `force`: everything); returns how many cases ran and how many were there.

    Args:
        folder: of the experiment's results.
        progress: is told what runs now, how many cases are done, and how many there are.

    Raises:
        VdnnError: whatever a case raises; what was done before stays.
    """
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    files = Files(folder)
    cases = experiment.cases
    missing = [case for case in cases if force or not files.result(case).exists()]
    there = len(cases) - len(missing)
    if force:
        for case in missing:
            files.result(case).unlink(missing_ok=True)
    extras = extras_of(experiment, folder)
    open_extras = [extra for extra in extras if force or not extra.path.exists()]
    there += len(extras) - len(open_extras)
    if force:
        for extra in open_extras:
            extra.path.unlink(missing_ok=True)

    def tell(what: str) -> None:
        done = sum(files.result(case).exists() for case in cases) + sum(extra.path.exists() for extra in extras)
        progress(what, done, len(cases) + len(extras))

    for extra in open_extras:
        tell(extra.name)
        extra.run(tell)
    runner = _Runner(experiment, folder, tell)
    for group in iter_steps(cases):
        late = [case for case in group if case in missing]
        if late and late[0].kind == "run":
            late = list(group)  # each policy is compared with the run without offload, so that runs again too
        if late:
            runner.step(late)
    return len(missing) + len(open_extras), there
