"""Every case has a test, every marker is of a case, and the page says so."""

from __future__ import annotations

from tests.engine.cases.catalogue import CASES, ELSEWHERE, PAGE, ROOT, RULES, marked_tests, table


def test_every_case_has_a_test() -> None:
    assert set(CASES) == set(range(1, 62))
    assert sorted(set(CASES) - set(marked_tests()) - set(ELSEWHERE)) == []


def test_every_marker_is_of_a_case() -> None:
    assert sorted(set(marked_tests()) - set(CASES)) == []


def test_every_rule_is_tried_by_cases_that_there_are() -> None:
    assert all(RULES.values())
    assert sorted(set().union(*RULES.values()) - set(CASES)) == []


def test_the_tests_that_the_page_names_besides_are_there() -> None:
    sources = [path.read_text() for path in (ROOT / "tests" / "engine").rglob("*.py")]
    for name in ("test_a_state_that_does_not_allow_a_move_is_named", "every_call_is_one_of_cudas"):
        assert any(f"def {name}(" in source for source in sources)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == table(), "run: python -m tests.engine.cases.catalogue"
