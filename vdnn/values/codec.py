"""The JSON form of the five values: one envelope, exact round trip, and errors that name what is wrong.

    {"vdnn": "trace", "version": 1, "value": {…}}

A frozen dataclass becomes an object with its fields. A tuple of *records* (dataclasses marked with
`@record`) becomes a table, `{"columns": […], "rows": [[…], …]}`: a trace has thousands of ops, and naming
the fields of each would double its file. A file whose name ends in `.gz` is gzipped. The envelope of a plan
has one thing more, `"noted"`: a digest of all but its notes, which tell what the simulator made of it. Where a file was
changed by hand since, they are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import json
import operator
import os
import types
import typing
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from vdnn.errors import FormatError

__all__ = ["decode", "dumps", "encode", "fingerprint", "kind_of", "load", "loads", "record", "save", "value"]

T = TypeVar("T")
_KINDS: dict[str, tuple[type, int]] = {}
_CHANGED: dict[str, str] = {}
_RECORDS: set[type] = set()
_PLAIN = frozenset((int, str, float, bool, type(None)))


def value(kind: str, version: int, *, changed: str = "") -> Callable[[type[T]], type[T]]:
    """Register a frozen dataclass as a value with a file form of its own.

    `changed` is what stands for its notes where a file was changed after they were made; "": they tell of nothing else.
    """

    def register(cls: type[T]) -> type[T]:
        _KINDS[kind] = (cls, version)
        if changed:
            _CHANGED[kind] = changed
        return cls

    return register


def record(cls: type[T]) -> type[T]:
    """Mark a frozen dataclass as a row of a table."""
    _RECORDS.add(cls)
    return cls


def kind_of(obj: object) -> str:
    """The registered kind of a value: "trace", "plan", …"""
    for kind, (cls, _) in _KINDS.items():
        if type(obj) is cls:
            return kind
    raise TypeError(f"{type(obj).__name__} has no file form")


# -- encoding ------------------------------------------------------------------------------------


def encode(obj: Any) -> Any:
    """Plain JSON data (dicts, lists, numbers, strings) of a value."""
    cls = type(obj)
    if cls in _PLAIN:
        return obj
    if cls is tuple:
        if obj and type(obj[0]) in _RECORDS and all(type(item) is type(obj[0]) for item in obj):
            names = [field.name for field in dataclasses.fields(obj[0])]
            fields = operator.attrgetter(*names) if len(names) > 1 else lambda item: (getattr(item, names[0]),)
            rows = [[v if type(v) in _PLAIN else encode(v) for v in fields(item)] for item in obj]
            return {"columns": names, "rows": rows}
        return [item if type(item) in _PLAIN else encode(item) for item in obj]
    if dataclasses.is_dataclass(obj):
        return {field.name: encode(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    raise TypeError(f"a value holds {cls.__name__}, which has no JSON form")


def dumps(obj: Any) -> str:
    """The JSON text of a value, in its envelope."""
    kind, data = kind_of(obj), encode(obj)
    noted = {"noted": _noted(data)} if kind in _CHANGED and obj.notes else {}
    return _text({"vdnn": kind, "version": _KINDS[kind][1], **noted, "value": data})


def _text(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def _noted(data: Any) -> str:
    """Sixteen hex digits of what notes are about: all the rest, however it is laid out in the file."""
    rest = {name: part for name, part in data.items() if name != "notes"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


_FINGERPRINTS: deque[tuple[Any, str]] = deque(maxlen=4)


def fingerprint(obj: Any) -> str:
    """Sixteen hex digits that two equal values share and others do not.

    The last few are remembered: values do not change, and that of a large trace takes a tenth of a second.
    """
    for known, digits in _FINGERPRINTS:
        if known is obj:
            return digits
    kind = kind_of(obj)
    bare = _text({"vdnn": kind, "version": _KINDS[kind][1], "value": encode(obj)})
    digits = hashlib.sha256(bare.encode()).hexdigest()[:16]
    _FINGERPRINTS.append((obj, digits))
    return digits


def save(obj: Any, path: str | Path) -> Path:
    """Write a value, whole or not at all; gzipped (without a date, so equal values give equal files) for `.gz`."""
    path = Path(path)
    data = (dumps(obj) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


# -- decoding ------------------------------------------------------------------------------------


class _BadData(Exception):
    """What is wrong, and where: the path grows on the way up."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.path: list[str] = []

    def at(self, step: str) -> _BadData:
        self.path.insert(0, step)
        return self


def decode(cls: type[T], data: Any) -> T:
    """A value from plain JSON data.

    Raises:
        FormatError: a field is missing, unknown, or of the wrong type; names its path.
    """
    try:
        return cast(T, _decoder(cast(Any, cls))(data))
    except _BadData as bad:
        where = "".join(bad.path).lstrip(".") or "the value"
        raise FormatError(f"not a valid {cls.__name__}: {where} {bad.what}") from None


def loads(text: str, kind: str | None = None, name: str = "the text") -> Any:
    """A value from its JSON text.

    Raises:
        FormatError: not JSON, not vdnn's, another kind than asked for, or of a newer version.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name} is not JSON ({error}): truncated or another program's file?") from None
    if not isinstance(data, dict) or not isinstance(data.get("vdnn"), str):
        raise FormatError(f"{name} is not a vdnn file: it has no 'vdnn' entry that says what it holds")
    found = data["vdnn"]
    if found not in _KINDS:
        raise FormatError(f"{name} holds a {found!r}; this vdnn reads {', '.join(sorted(_KINDS))}")
    if kind is not None and found != kind:
        raise FormatError(f"{name} holds a {found}, but a {kind} is needed here")
    cls, version = _KINDS[found]
    if not isinstance(data.get("version"), int) or isinstance(data["version"], bool):
        raise FormatError(f"{name} does not say the version of its {found} format")
    if data["version"] > version:
        raise FormatError(f"{name} has {found} format {data['version']}, this vdnn reads up to {version}: update vdnn")
    if data["version"] < version:
        raise FormatError(f"{name} has {found} format {data['version']}, this vdnn reads {version}: make it again")
    try:
        obj: Any = decode(cls, data.get("value"))
        if found in _CHANGED and data.get("noted", "") not in ("", _noted(data["value"])):
            obj = dataclasses.replace(obj, notes=(_CHANGED[found],))
        check = getattr(obj, "check", None)
        if check is not None:
            check()
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None
    return obj


def load(path: str | Path, kind: str | None = None) -> Any:
    """Read a value from a file.

    Raises:
        FormatError: no such file, damaged, not vdnn's, of another kind or of a newer version.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from None
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise FormatError(f"{path} is a damaged gzip file: {error}") from None
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise FormatError(f"{path} is not a vdnn file: it is not text") from None
    return loads(text, kind, str(path))


_Decoder = Callable[[Any], Any]


def _plain(expected: type, article: str) -> _Decoder:
    def convert(data: Any) -> Any:
        if type(data) is expected:
            return data
        if expected is float and type(data) is int:
            return float(data)
        raise _BadData(f"should be {article}, not {_shown(data)}")

    return convert


def _shown(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 40 else text[:37] + "…"


@functools.cache
def _decoder(hint: Any) -> _Decoder:
    if hint is int:
        return _plain(int, "a whole number")
    if hint is float:
        return _plain(float, "a number")
    if hint is str:
        return _plain(str, "a text")
    if hint is bool:
        return _plain(bool, "true or false")
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return _literal(typing.get_args(hint))
    if origin is tuple:
        return _tuple(typing.get_args(hint))
    if origin in (types.UnionType, typing.Union):
        return _union(typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        return _dataclass(cast(type, hint))
    raise TypeError(f"no JSON form for {hint!r}")


def _literal(allowed: tuple[Any, ...]) -> _Decoder:
    def convert(data: Any) -> Any:
        if data in allowed and type(data) is type(allowed[0]):
            return data
        raise _BadData(f"is {_shown(data)}, but may be {', '.join(map(str, allowed))}")

    return convert


def _union(members: tuple[Any, ...]) -> _Decoder:
    """None, or one dataclass told from the others by its literal field `action`, or one other type."""
    optional = type(None) in members
    others = [m for m in members if m is not type(None)]
    if len(others) == 1:
        inner = _decoder(others[0])
        return lambda data: None if data is None else inner(data)
    by_action: dict[str, _Decoder] = {}
    for member in others:
        (action,) = typing.get_args(typing.get_type_hints(member)["action"])
        by_action[action] = _decoder(member)

    def convert(data: Any) -> Any:
        if data is None and optional:
            return None
        action = data.get("action") if isinstance(data, dict) else None
        if not isinstance(action, str) or action not in by_action:
            raise _BadData(f"has action {action!r}, but may have {', '.join(sorted(by_action))}")
        return by_action[action](data)

    return convert


def _tuple(args: tuple[Any, ...]) -> _Decoder:
    if len(args) == 2 and args[1] is Ellipsis:
        item_decoder = _decoder(args[0])
        rows = _rows(args[0]) if args[0] in _RECORDS else None

        def convert(data: Any) -> Any:
            if rows is not None and isinstance(data, dict):
                return rows(data)
            if not isinstance(data, list):
                raise _BadData(f"should be a list, not {_shown(data)}")
            try:
                return tuple(map(item_decoder, data))
            except _BadData:
                return tuple(_each(item_decoder, data))

        return convert
    decoders = [_decoder(arg) for arg in args]

    def convert_fixed(data: Any) -> Any:
        if not isinstance(data, list) or len(data) != len(decoders):
            raise _BadData(f"should be a list of {len(decoders)}, not {_shown(data)}")
        return tuple(_at(f"[{i}]", d, item) for i, (d, item) in enumerate(zip(decoders, data, strict=True)))

    return convert_fixed


def _each(decoder: _Decoder, data: list[Any]) -> list[Any]:
    return [_at(f"[{index}]", decoder, item) for index, item in enumerate(data)]


def _at(step: str, decoder: _Decoder, data: Any) -> Any:
    try:
        return decoder(data)
    except _BadData as bad:
        raise bad.at(step) from None


def _rows(cls: type) -> _Decoder:
    names = [field.name for field in dataclasses.fields(cls)]
    hints = typing.get_type_hints(cls)
    decoders = [_decoder(hints[name]) for name in names]

    def one(row: Any) -> Any:
        if not isinstance(row, list) or len(row) != len(decoders):
            raise _BadData(f"should be a row of {len(decoders)}, not {_shown(row)}")
        return cls(*[_at(f".{n}", d, item) for n, d, item in zip(names, decoders, row, strict=True)])

    def convert(data: Any) -> Any:
        if data.get("columns") != names:
            raise _BadData(f"has columns {_shown(data.get('columns'))}, but should have {names}")
        if set(data) != {"columns", "rows"} or not isinstance(data["rows"], list):
            raise _BadData("should be a table with 'columns' and 'rows'")
        return tuple(_each(one, data["rows"]))

    return convert


def _dataclass(cls: type) -> _Decoder:
    names = [field.name for field in dataclasses.fields(cls)]
    known = set(names)
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    decoders: dict[str, _Decoder] = {}

    def convert(data: Any) -> Any:
        if not decoders:  # late, so that a dataclass may hold itself
            hints = typing.get_type_hints(cls)
            decoders.update({name: _decoder(hints[name]) for name in names})
        if not isinstance(data, dict):
            raise _BadData(f"should be an object, not {_shown(data)}")
        if not known >= data.keys():
            raise _BadData(f"has the unknown field {sorted(data.keys() - known)[0]!r}")
        if not required <= data.keys():
            raise _BadData(f"lacks the field {sorted(required - data.keys())[0]!r}")
        return cls(**{name: _at(f".{name}", decoders[name], item) for name, item in data.items()})

    return convert
