"""The JSON form of the five values: what is written is read back, and what cannot be read says why."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import hardwares, plans, results, timelines, traces
from vdnn.errors import FormatError
from vdnn.values import OUTSIDE, Entry, Keep, Plan, SavedName, Timeline, dumps, fingerprint, load, loads, save

any_value = st.one_of(traces(), plans(), hardwares(), timelines(), results())

NAME = SavedName("conv1", 0, 0, "float32", 4, 64)
PLAN = Plan("all", "m", 1, "cuda", "", None, (Entry((NAME,), 64, Keep("small")),))


def changed(value: Any, **fields: Any) -> str:
    """The value's JSON text with some entries of its envelope replaced."""
    return json.dumps(json.loads(dumps(value)) | fields)


@given(any_value)
def test_a_value_that_is_written_and_read_is_the_same_value(value: Any) -> None:
    again = loads(dumps(value))
    assert again == value
    assert type(again) is type(value)
    assert dumps(again) == dumps(value)
    assert fingerprint(again) == fingerprint(value)


@given(value=any_value)
def test_a_file_holds_the_value_plain_or_gzipped(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("values")
    for name in ("v.json", "v.json.gz"):
        assert load(save(value, folder / "deeper" / name)) == value


def test_equal_values_give_equal_gzip_files(tmp_path: Path) -> None:
    first = save(PLAN, tmp_path / "a.json.gz").read_bytes()
    assert first == save(PLAN, tmp_path / "b.json.gz").read_bytes()
    assert first[:2] == b"\x1f\x8b"


@given(st.lists(traces(), min_size=2, max_size=2))
def test_fingerprints_are_equal_only_for_equal_traces(pair: list[Any]) -> None:
    assert (pair[0].fingerprint() == pair[1].fingerprint()) is (pair[0] == pair[1])


# -- notes ---------------------------------------------------------------------------------------

NOTED = Plan("budget", "m", 1, "cuda", "", 1 << 30, PLAN.entries, notes=("no plan takes less than 2 ms here",))


def test_a_plan_that_was_changed_by_hand_does_not_keep_the_notes_of_the_old_one() -> None:
    """The gap, the bound and the predicted time of the plan as it was were printed for what was left of it."""
    text = dumps(NOTED)
    assert loads(text).notes == NOTED.notes
    edited = loads(text.replace('"why":"small"', '"why":"mine"'))
    assert edited.entries[0].action == Keep("mine")
    assert "no plan takes less" not in " ".join(edited.notes)
    assert "changed after it was made" in edited.notes[0]
    assert loads(dumps(edited)) == edited  # and what is written again is read as it is
    larger = loads(text.replace(f'"budget_bytes":{1 << 30}', f'"budget_bytes":{1 << 31}'))
    assert larger.notes == edited.notes


def test_notes_stay_where_only_the_layout_or_the_notes_themselves_are_changed() -> None:
    data = json.loads(dumps(NOTED))
    assert loads(json.dumps(data, indent=2, sort_keys=True)) == NOTED
    data["value"]["notes"] = ["mine"]
    assert loads(json.dumps(data)).notes == ("mine",)


def test_a_file_without_a_digest_of_what_its_notes_are_about_is_read_as_it_is() -> None:
    data = json.loads(dumps(NOTED))
    del data["noted"]
    assert loads(json.dumps(data)) == NOTED
    assert "noted" not in json.loads(dumps(PLAN))


# -- what cannot be read -------------------------------------------------------------------------


@given(st.data())
def test_a_truncated_text_is_never_read(data: st.DataObject) -> None:
    text = dumps(PLAN)
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(FormatError, match="truncated or another program's file"):
        loads(text[:cut])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "not a vdnn file"),
        ("{}", "not a vdnn file"),
        ('{"vdnn": 3}', "not a vdnn file"),
        ('{"traceEvents": []}', "not a vdnn file"),
        ('{"vdnn": "recipe", "version": 1}', "'recipe'.*reads hardware, plan, result, timeline, trace"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_json_of_another_program_is_refused(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        loads(text)


def test_another_kind_than_asked_for_is_refused() -> None:
    with pytest.raises(FormatError, match="holds a plan, but a trace is needed"):
        loads(dumps(PLAN), "trace")


@pytest.mark.parametrize(
    ("version", "message"),
    [(99, "reads up to 1: update vdnn"), (0, "make it again"), ("1", "does not say the version"), (True, "version")],
)
def test_another_version_is_refused(version: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        loads(changed(PLAN, version=version))


@given(data=st.data())
def test_a_damaged_gzip_file_is_refused_wherever_it_is_damaged(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = gzip.compress((dumps(PLAN) + "\n").encode(), mtime=0)
    place = data.draw(st.integers(2, len(whole) - 1))
    damaged = data.draw(
        st.sampled_from([whole[:place], whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]])
    )
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "plan.json.gz").write_bytes(damaged)
    try:
        loaded = load(folder / "plan.json.gz")
    except FormatError:
        return
    assert place < 10, "only the header of a gzip file holds bytes that no checksum covers"
    assert loaded == PLAN


def test_a_missing_file_and_a_binary_file_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"cannot read .*none\.json: No such file"):
        load(tmp_path / "none.json")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(FormatError, match=r"image\.png is not a vdnn file: it is not text"):
        load(tmp_path / "image.png")


def test_a_missing_field_is_named_with_its_path() -> None:
    data = json.loads(dumps(PLAN))
    del data["value"]["entries"][0]["storage_bytes"]
    with pytest.raises(FormatError, match=r"not a valid Plan: entries\[0\] lacks the field 'storage_bytes'"):
        loads(json.dumps(data))


def test_an_unknown_field_is_named_with_its_path() -> None:
    data = json.loads(dumps(PLAN))
    data["value"]["entries"][0]["action"]["colour"] = "red"
    with pytest.raises(FormatError, match=r"entries\[0\]\.action has the unknown field 'colour'"):
        loads(json.dumps(data))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("batch",), "16", r"batch should be a whole number, not '16'"),
        (("batch",), True, r"batch should be a whole number, not True"),
        (("batch",), 1.0, r"batch should be a whole number"),
        (("model",), None, r"model should be a text"),
        (("default",), "sometimes", r"default is 'sometimes', but may be keep, offload"),
        (("entries",), {}, r"entries should be a list"),
        (("entries", 0, "saved", "rows", 0, 4), "four", r"entries\[0\]\.saved\[0\]\.rank should be a whole number"),
        (("entries", 0, "saved", "rows", 0), [1], r"entries\[0\]\.saved\[0\] should be a row of 6"),
        (("entries", 0, "saved", "columns"), ["x"], r"entries\[0\]\.saved has columns"),
        (
            ("entries", 0, "action", "action"),
            "burn",
            r"entries\[0\]\.action has action 'burn', but may have copy, .*keep, offload",
        ),
        (("entries", 0, "action", "action"), ["keep"], r"entries\[0\]\.action has action"),
    ],
)
def test_a_field_of_the_wrong_type_is_named_with_its_path(path: tuple[Any, ...], value: Any, message: str) -> None:
    data = json.loads(dumps(PLAN))
    place = data["value"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(FormatError, match=message):
        loads(json.dumps(data))


def test_a_value_that_is_read_is_also_checked() -> None:
    twice = Plan("all", "m", 1, "cuda", "", None, (PLAN.entries[0], PLAN.entries[0]))
    with pytest.raises(FormatError, match="conv1#0/0 is in two entries"):
        loads(dumps(twice))


def test_only_values_have_a_file_form() -> None:
    with pytest.raises(TypeError, match="has no file form"):
        dumps(NAME)
    assert loads(dumps(Timeline())) == Timeline()
    assert OUTSIDE not in dumps(PLAN)
