"""How a result came about: command line, commit and version, collected without torch."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from vdnn import __version__
from vdnn.values import Provenance

__all__ = ["provenance"]


def provenance(torch: str = "", cuda: str = "", device: str = "", seed: int | None = None) -> Provenance:
    """The provenance of a run that this process makes; what only torch knows is the caller's to give."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv and sys.argv[0] else ""
    return Provenance(command, _commit(), __version__, torch, cuda, device, seed)


def _commit() -> str:
    """The commit of vdnn's source tree, with "-dirty" for changed files; "" for an installed vdnn."""
    source = Path(__file__).resolve()
    # An installed vdnn may lie inside the user's own repository, whose commit says nothing about vdnn.
    if _git(source, "ls-files", "--error-unmatch", source.name) is None:
        return ""
    commit = _git(source, "rev-parse", "HEAD")
    if commit is None:
        return ""
    return commit + ("-dirty" if _git(source, "status", "--porcelain", "--untracked-files=no") else "")


def _git(source: Path, *arguments: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(source.parent), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
