"""What a GPU says: ordering, gradients, limits, time and memory of every method, each beside its prediction.

    python experiments/gpu/check.py -o results/gpu                       on a CUDA device, at most 8 minutes
    python experiments/gpu/check.py -o results/gpu --part compared --model vit    one part, one network
    python experiments/gpu/check.py -o /tmp/gpu --virtual                the same path on a CPU, small, no timings

Started from the source tree. Each part writes PART.json into the folder (with `--model`, PART-MODEL.json), with the
name of the card, and after each row what it has so far. Parts run in the order of what they tell, each in a process of
its own; a part that fails or crashes is recorded with its error, and the others go on; a part that would start after
the time is up is recorded as not run. Peers (torchtune, trl, deepspeed) are compared where they can be imported:
README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

import vdnn
from experiments.gpu.parts import PARTS
from experiments.gpu.session import ROOT, Session

SECONDS, LAST_SECONDS = 420, 50  # a call may take 480: nothing starts after the first, and the last ends what runs


def provenance(virtual: bool) -> dict[str, Any]:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "command": "experiments/gpu/check.py",
        "commit": done.stdout.strip(),
        "vdnn": vdnn.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": "virtual" if virtual else torch.cuda.get_device_name(),
        "gpu_memory_bytes": 0 if virtual else torch.cuda.get_device_properties().total_memory,
        "source": "measured",
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'model':32} {'method':28} {'step s':>8} {'slower':>7} {'peak GiB':>9} {'predicted':>9} {'moved GiB':>9}"
    ]
    for row in rows:
        got, said = row.get("measured", {}), row.get("predicted", {})

        def gib(nbytes: int | None) -> str:
            return f"{nbytes / 2**30:9.2f}" if nbytes is not None else f"{'--':>9}"

        line = f"{row['model'][:32]:32} {row['method']:28} "
        line += f"{got['step_s']:8.4f} " if "step_s" in got else f"{'--':>8} "
        line += f"{got['slowdown']:7.3f} " if "slowdown" in got else f"{'--':>7} "
        line += f"{gib(got.get('peak_requested_bytes'))} {gib(said.get('peak_requested_bytes'))} "
        line += gib(got.get("offloaded_bytes"))
        why = row.get("not_run") or row.get("out_of_memory") or row.get("failed")
        lines.append(line + (f"  {why}" if why else ""))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--virtual", action="store_true", help="small, on the CPU, to check the script itself")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--part", action="append", choices=tuple(PARTS), help="only this one (may be repeated)")
    parser.add_argument("--model", action="append", default=[], help="only networks with this in their name")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="nothing new is started after this long")
    given = parser.parse_args(arguments)
    if not given.virtual and not torch.cuda.is_available():
        print("no CUDA device here: run with --virtual to check the script itself", file=sys.stderr)
        return 2
    given.output.mkdir(parents=True, exist_ok=True)
    session = Session(given.virtual, given.output, given.seconds, given.model)
    if not session.workloads:
        print(f"no network has {' or '.join(given.model)} in its name", file=sys.stderr)
        return 2
    parts = [name for name in PARTS if not given.part or name in given.part]
    if len(parts) == 1:
        return run_part(parts[0], session, given.model)
    codes = [_in_process(name, session, given) for name in parts]
    return 1 if any(codes) else 0


def _path(folder: Path, name: str, models: list[str]) -> Path:
    return folder / f"{'-'.join([name, *models])}.json"


def _write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n")


def run_part(name: str, session: Session, models: list[str]) -> int:
    """Run one part and write what it found, in between, too."""
    path, begin = _path(session.folder, name, models), time.perf_counter()
    found: dict[str, Any] = {"provenance": provenance(session.virtual)}
    session.keep = lambda result: _write(path, {**found, "unfinished": True, "result": result})
    if session.over():
        found["not_run"] = "the time was up"
    else:
        session.keep(None)
        try:
            found["result"] = PARTS[name](session)
        except Exception as error:
            found |= {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc(limit=-4)}
            if kept := json.loads(path.read_text())["result"]:
                found["result"] = kept
    found["seconds"] = round(time.perf_counter() - begin, 1)
    _write(path, found)
    verdict = found.get("error") or found.get("not_run") or "done"
    print(f"{name}: {found['seconds']} s, {verdict}", file=sys.stderr)
    if name == "compared" and "result" in found:
        print(table(found["result"]))
    return 1 if "error" in found else 0


def _in_process(name: str, session: Session, given: argparse.Namespace) -> int:
    """Run one part in a process of its own: an error of CUDA's, or a crash, takes the whole process with it."""
    path, left = _path(session.folder, name, given.model), max(0.0, session.left_s())
    path.unlink(missing_ok=True)
    if session.over():
        return run_part(name, session, given.model)
    command = [sys.executable, __file__, "-o", str(session.folder), "--part", name, "--seconds", f"{left:.0f}"]
    command += [word for model in given.model for word in ("--model", model)]
    process = subprocess.Popen([*command, *(["--virtual"] if session.virtual else [])], start_new_session=True)
    try:
        code = process.wait(left + LAST_SECONDS)
    except subprocess.TimeoutExpired:
        code = -signal.SIGKILL
    finally:  # with what it started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code not in (0, 1):
        found = json.loads(path.read_text()) if path.exists() else {"provenance": provenance(session.virtual)}
        ended = f"its process ended with {code} (a signal, if negative; {-signal.SIGKILL}: it took too long)"
        _write(path, {**found, "error": ended})
        print(f"{name}: {ended}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
