"""The model against torch's own allocator: the installed libc10_cuda, linked with a CUDA runtime that only pretends.

No GPU and no driver: pretended_cuda.cpp beside this file answers cudaMalloc with numbers. So this checks the
allocator's decisions, not what a device does. Expandable segments call the driver and are not covered.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from vdnn.errors import DeviceOutOfMemory
from vdnn.sim.allocator import AddressSpace, CachingAllocator, parse_settings

MIB = 2**20
STREAMS = (0, 4096, 8192)  # addresses of CUDA streams are even

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def torchs_allocator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled against the installed torch."""
    torch = pytest.importorskip("torch")
    root = Path(torch.__file__).parent
    includes = [root.parent / "triton/backends/nvidia/include", Path("/usr/local/cuda/include")]
    if not (root / "lib/libc10_cuda.so").exists() or shutil.which("g++") is None:
        pytest.skip("needs a CUDA build of torch, and g++")
    out = tmp_path_factory.mktemp("real") / "pretended_cuda"
    libraries = [root / "lib", *(path.parent for path in root.parent.glob("nvidia/*/lib/libcudart.so*"))]
    command = ["g++", "-O1", "-std=c++20", "-w", str(Path(__file__).with_name("pretended_cuda.cpp")), "-o", str(out)]
    command += [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10", "-lc10_cuda"]
    command += ["-Wl,--export-dynamic", "-Wl,--allow-shlib-undefined", *(f"-Wl,-rpath,{path}" for path in libraries)]
    why = "no CUDA headers: they come with triton, or with CUDA itself"
    for cuda in includes:
        if (cuda / "cuda_runtime_api.h").exists():
            done = subprocess.run([*command, f"-I{cuda}"], capture_output=True, text=True, check=False)
            if not done.returncode:
                return out
            why = f"the program cannot be compiled: {done.stderr[-300:]}"
    pytest.skip(why)


def history(rng: random.Random) -> list[tuple]:
    """A program's calls: sizes at and around every limit, one stream or three."""

    def size() -> int:
        kind = rng.random()
        if kind < 0.2:
            return rng.choice([1, 511, 512, 513, MIB - 1, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 20 * MIB, 21 * MIB])
        return rng.randint(1, rng.choice([4096, 2 * MIB, 30 * MIB, 200 * MIB]))

    calls: list[tuple] = []
    alive: list[int] = []
    several = rng.random() < 0.6
    for number in range(rng.choice([20, 100, 400, 1500])):
        kind, stream = rng.random(), rng.choice(STREAMS) if several else 0
        if kind < 0.5 or not alive:
            alive.append(number)
            calls.append(("malloc", number, size(), stream))
        elif kind < 0.85:
            calls.append(("free", alive.pop(rng.randrange(len(alive)))))
        elif kind < 0.92 and several:
            calls.append(("use", rng.choice(alive), stream))
        elif kind < 0.985:
            calls.append(("finish", stream))
        elif rng.random() < 0.5:
            calls.append(("empty",))
    return calls


def chosen_settings(rng: random.Random) -> str:
    choices = {
        "max_split_size_mb": ["20", "24", "64", "128"],
        "max_non_split_rounding_mb": ["20", "30"],
        "roundup_power2_divisions": ["4", "8", "[256:1,512:2,1024:4,>:8]", "[1:4,2:8,64:2,>:16]"],
        "garbage_collection_threshold": ["0.25", "0.6", "0.8"],
    }
    return ",".join(f"{key}:{rng.choice(values)}" for key, values in choices.items() if rng.random() < 0.35)


def in_order(events: list[tuple]) -> list[tuple]:
    """Blocks that become free one after the other, sorted: torch goes through the streams in no order."""
    found: list[tuple] = []
    run: list[tuple] = []
    for event in [*events, ("",)]:
        if event[0] == "free_completed":
            run.append(event)
        else:
            found += [*sorted(run), event]
            run = []
    return found


def oldest_first() -> bool:
    """Which release the installed torch is like; between 2.11 and 2.14 the rule is not known."""
    import torch

    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if (2, 11) < release < (2, 14):
        pytest.skip(f"of torch {torch.__version__} it is not known how it orders equal blocks")
    return release >= (2, 14)


@pytest.mark.parametrize("seed", range(60))
def test_every_event_segment_and_statistic_is_torchs(torchs_allocator: Path, seed: int) -> None:
    rng = random.Random(seed)
    calls, settings = history(rng), chosen_settings(rng)
    capacity, fraction = rng.choice([1 << 40, 100 * MIB, 300 * MIB, 1000 * MIB]), rng.choice([0, 0, 0.5, 0.9])
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_ALLOC_CONF")}
    done = subprocess.run(
        [torchs_allocator, str(capacity), str(fraction)],
        input="\n".join(" ".join(map(str, call)) for call in calls),
        env=environment | {"PYTORCH_CUDA_ALLOC_CONF": settings},
        capture_output=True,
        text=True,
        check=True,
    )
    events: list[tuple] = []
    segments: list[tuple[tuple, list[tuple]]] = []
    numbers: dict[str, int] = {}
    for kind, *words in map(str.split, done.stdout.splitlines()):
        if kind == "E":
            events.append((words[0], *map(int, words[1:])))
        elif kind == "S":
            segments.append((tuple(map(int, words)), []))
        elif kind == "B":
            segments[-1][1].append(tuple(map(int, words)))
        else:
            numbers[words[0]] = int(words[1])
    assert len(events) >= len(calls) // 2

    allowed = int(fraction * float(capacity)) if fraction else None
    options = replace(parse_settings(settings), oldest_segment_first=oldest_first())
    model = CachingAllocator(AddressSpace(capacity), options, allowed_bytes=allowed)
    model.history = []
    live: dict[int, int] = {}
    for call, *arguments in calls:
        if call == "malloc":
            number, size, stream = arguments
            with contextlib.suppress(DeviceOutOfMemory):
                live[number] = model.malloc(size, stream)
        elif call == "finish":
            model.finish(arguments[0])
        elif call == "empty":
            model.empty_cache()
        elif arguments[0] in live and call == "free":
            model.free(live.pop(arguments[0]))
        elif arguments[0] in live:
            model.record_stream(live[arguments[0]], arguments[1])
    assert in_order([event[:4] for event in model.history]) == in_order(events)
    own = [
        (
            (blocks[0].addr, sum(b.size for b in blocks), blocks[0].shelf.stream, int(not blocks[0].shelf.small)),
            [(b.size, b.requested if b.state else 0, b.state) for b in blocks],
        )
        for blocks in model.segments()
    ]
    assert own == segments
    statistics = model.statistics()
    # the order in which blocks of several streams become free is torch's own, and shows in these peaks only
    compared = {name for name in numbers if not (name.startswith("inactive_split") and name.endswith("peak"))}
    assert {name: statistics[name] for name in compared} == {name: numbers[name] for name in compared}
