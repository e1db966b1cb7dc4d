"""Every case has a test, every marker is of a case, and the page says so."""

from __future__ import annotations

from tests.engine.cases.catalogue import CASES, ELSEWHERE, PAGE, marked_tests, table


def test_every_case_has_a_test() -> None:
    assert set(CASES) == set(range(1, 62))
    assert sorted(set(CASES) - set(marked_tests()) - set(ELSEWHERE)) == []


def test_every_marker_is_of_a_case() -> None:
    assert sorted(set(marked_tests()) - set(CASES)) == []


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == table(), "run: python -m tests.engine.cases.catalogue"
