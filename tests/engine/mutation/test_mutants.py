"""Every mutant of the engine is noticed: a race, wrong numbers, a leak, or an error that should not be there."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.engine.mutation.loading import ENGINE, FILES, MutationError, engine_with
from tests.engine.mutation.locksets import Monitor, watched
from tests.engine.mutation.operators import KINDS, Mutant, mutants_of
from tests.engine.mutation.scenarios import SCENARIOS
from tests.engine.mutation.scenarios.threads import WATCHED, races_in

MUTANTS = [mutant for file in FILES for mutant in mutants_of((ENGINE / file).read_text(), file)]


def noticed(mutant: Mutant | None) -> str:
    """What is wrong with the mutant, and which scenario says so; "" if nothing is."""
    checks = [_by_scenarios, _by_lock_sets]
    if mutant is not None and mutant.kind == "lock":
        checks.reverse()
    for check in checks:
        found = check(mutant)
        if found:
            return found
    return ""


def _by_scenarios(mutant: Mutant | None) -> str:
    with engine_with(mutant) as engine:
        for name, run in SCENARIOS.items():
            try:
                run(engine)
            except MutationError:
                raise
            except Exception as error:
                return f"{type(error).__name__} in {name}: {error}"
    return ""


def _by_lock_sets(mutant: Mutant | None) -> str:
    monitor = Monitor()
    with engine_with(mutant, watched, monitor.names) as engine:
        try:
            races = races_in(engine, monitor)
        except Exception as error:
            return f"{type(error).__name__} in {list(WATCHED)}: {error}"
    return f"no common lock: {races[0]}" if races else ""


def test_the_engine_as_it_is_passes_every_scenario() -> None:
    assert noticed(None) == ""


def test_every_mutant_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    """No mutant is exempt. One that survives shows a weak detector, a missing scenario or a line that does nothing."""
    start = time.monotonic()
    reports = [(mutant, noticed(mutant)) for mutant in MUTANTS]
    survivors = [str(mutant) for mutant, report in reports if not report]
    kinds = Counter(mutant.kind for mutant in MUTANTS)
    how = Counter(report.split(" in ")[0].split(":")[0] for _, report in reports)
    with capsys.disabled():
        print(f"\n{len(MUTANTS)} mutants of {len(FILES)} files, {len(MUTANTS) - len(survivors)} noticed:", end=" ")
        print(", ".join(f"{kind} {kinds[kind]}" for kind in KINDS), end="; ")
        print("by", ", ".join(f"{name!r} {n}" for name, n in how.most_common()), end="; ")
        print(f"{time.monotonic() - start:.0f} s")
    assert not survivors, "\n".join(["these mutants pass every scenario:", *survivors])
    assert set(kinds) == set(KINDS)
