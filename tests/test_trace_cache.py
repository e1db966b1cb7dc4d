"""Traces on disk: found again, and only where nothing that decides them has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from vdnn import trace_cache
from vdnn.analysis.synthetic import conv_chain

TRACE = conv_chain()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VDNN_CACHE", str(tmp_path / "traces"))
    return tmp_path / "traces"


def key(**changes: object) -> str | None:
    given = {
        "model": "demo:cnn",
        "batch": "2",
        "options": {},
        "precision": "fp32",
        "optimizer": "none",
        "device": "cpu",
    }
    return trace_cache.key_of(**{**given, **changes})


def test_a_trace_is_found_again() -> None:
    assert trace_cache.known(key()) is None
    trace_cache.keep(key(), TRACE)
    assert trace_cache.known(key()) == TRACE


def test_whatever_decides_a_trace_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [
        key(),
        key(model="demo:transformer"),
        key(batch="3"),
        key(options={"image_size": "32"}),
        key(precision="amp"),
        key(optimizer="sgd"),
        key(device="cuda"),
    ]
    monkeypatch.setattr(trace_cache, "_version", lambda library: f"{library} 99")
    keys.append(key())
    monkeypatch.setattr(trace_cache, "_source", lambda: "another")
    keys.append(key())
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_a_factory_is_never_kept(cache: Path) -> None:
    assert key(model="mine.py:make") is None
    trace_cache.keep(None, TRACE)
    assert not cache.exists()


def test_a_damaged_file_counts_as_absent_and_the_oldest_go(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace_cache.keep(key(), TRACE)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert trace_cache.known(key()) is None
    monkeypatch.setattr(trace_cache, "MOST", 2)
    for batch in "345":
        trace_cache.keep(key(batch=batch), TRACE)
    assert len(list(cache.iterdir())) == 2
    assert trace_cache.known(key(batch="5")) == TRACE


def test_a_disk_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VDNN_CACHE", str(tmp_path / "file" / "traces"))
    trace_cache.keep(key(), TRACE)
    assert trace_cache.known(key()) is None


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VDNN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert trace_cache.folder() == tmp_path / "vdnn" / "traces"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert trace_cache.folder() == Path.home() / ".cache" / "vdnn" / "traces"
