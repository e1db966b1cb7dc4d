"""How much host memory one process may take for offloaded storages, when nobody said.

A machine's memory is not a process's: a container has a limit of its own, so may a batch system (`ulimit -v`),
and the ranks of one node share what there is. Asking for more does not fail, it ends the process later.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["default_host_budget"]

# The rest of the process and of the machine needs some, too.
_SHARE = (7, 8)


def default_host_budget(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> int | None:
    """Bytes that may be reserved: seven eighths of the least that is free; None where nothing is known.

    Free memory of the machine and of the container is divided by LOCAL_WORLD_SIZE, the ranks on this node; the
    limit of the process (`ulimit -v`) is its own.
    """
    ranks = environ.get("LOCAL_WORLD_SIZE", "")
    shared = int(ranks) if ranks.isdigit() and int(ranks) > 0 else 1
    found = [free // shared for free in (_available(root), *_cgroups(root)) if free is not None]
    if (own := _address_space(root)) is not None:
        found.append(own)
    return max(min(found), 0) * _SHARE[0] // _SHARE[1] if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None  # "max" is no limit


def _available(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroups(root: Path) -> Iterator[int]:
    """What is free in each control group that the process is in, and in those around it: versions 2 and 1."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # inside a container the path is often the host's: then the group is at the root of the mount
        inner = base / path.lstrip("/")
        for group in {inner, *(p for p in inner.parents if p == base or base in p.parents), base}:
            most, now = _number(group / limit), _number(group / used)
            if most is not None and now is not None:
                yield most - now


def _address_space(root: Path) -> int | None:
    """What `ulimit -v` leaves."""
    for line in _read(root / "proc/self/limits").splitlines():
        if line.startswith("Max address space"):
            most = line.removeprefix("Max address space").split()[0]
            pages = _read(root / "proc/self/statm").split()
            if most.isdigit() and pages:
                return int(most) - int(pages[0]) * os.sysconf("SC_PAGE_SIZE")
    return None
