"""Sizes, bandwidths and times: how text becomes integers, and integers become text.

Inside the library sizes are `*_bytes: int` and times `*_ns: int`. "GiB" is 2**30 bytes, "GB" is 10**9:
memory is printed in MiB and GiB, bandwidth in GB/s, as vendors do.
"""

from __future__ import annotations

import re

from vdnn.errors import UsageError

__all__ = ["format_at_least", "format_bandwidth", "format_bytes", "format_ns", "parse_bandwidth", "parse_size"]

_FACTORS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: int | str) -> int:
    """Bytes from `"8GiB"`, `"500 MB"` or a number of bytes.

    Raises:
        UsageError: the text is not a positive size.
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise UsageError(f"{text!r} is not a size: write it like 8GiB, 500MB or as a number of bytes")
    if isinstance(text, int):
        size = text
    else:
        match = _SIZE.fullmatch(text)
        if match is None or match[2].upper() not in _FACTORS:
            raise UsageError(f"{text!r} is not a size: write it like 8GiB, 500MB or as a number of bytes")
        size = round(float(match[1]) * _FACTORS[match[2].upper()])
    if size <= 0:
        raise UsageError(f"{text!r} is not a size: it must be more than 0 bytes")
    return size


def parse_bandwidth(text: int | str) -> int:
    """Bytes per second from `"12GB/s"` or a number.

    Raises:
        UsageError: the text is not a positive bandwidth.
    """
    if isinstance(text, str) and text.strip().lower().endswith("/s"):
        text = text.strip()[:-2]
    try:
        return parse_size(text)
    except UsageError:
        raise UsageError(f"{text!r} is not a bandwidth: write it like 12GB/s or as bytes a second") from None


def format_bytes(size: int | None) -> str:
    """A size for people: `"1.25 GiB"`, `"12.0 MiB"`, `"640 B"`; `"--"` for None."""
    if size is None:
        return "--"
    magnitude = abs(size)
    if magnitude >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    if magnitude >= 2**20:
        return f"{size / 2**20:.1f} MiB"
    if magnitude >= 2**10:
        return f"{size / 2**10:.1f} KiB"
    return f"{size} B"


def format_at_least(size: int) -> str:
    """The same of a size to be given as a budget: rounded up, so that the text read again is no less."""
    text = format_bytes(size)
    if parse_size(text) >= size:
        return text
    last = {"GiB": 2**30 // 100, "MiB": 2**20 // 10, "KiB": 2**10 // 10}[text[-3:]]
    return format_bytes(size + last // 2 + 1)


def format_ns(time_ns: int | None) -> str:
    """A time for people: `"1.250 s"`, `"12.50 ms"`, `"3.0 µs"`; `"--"` for None."""
    if time_ns is None:
        return "--"
    magnitude = abs(time_ns)
    if magnitude >= 10**9:
        return f"{time_ns / 1e9:.3f} s"
    if magnitude >= 10**6:
        return f"{time_ns / 1e6:.2f} ms"
    if magnitude >= 10**3:
        return f"{time_ns / 1e3:.1f} µs"
    return f"{time_ns} ns"


def format_bandwidth(bytes_per_s: int) -> str:
    """A bandwidth for people: `"12.8 GB/s"`."""
    return f"{bytes_per_s / 1e9:.1f} GB/s"
