"""`Hardware`: what a machine can do. Presets are TOML files in `presets/`, one a GPU, each number with its source."""

from __future__ import annotations

import dataclasses
import functools
import json
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vdnn.errors import FormatError, unknown_name
from vdnn.values.codec import decode, fingerprint, load, record, value

__all__ = ["Efficiency", "Hardware", "Peak", "Source", "Timing", "hardware", "preset_ids", "to_toml"]


@record
@dataclass(frozen=True, slots=True)
class Peak:
    """Dense arithmetic peak for one dtype, in flops a second (a multiply-add is two)."""

    dtype: str
    flops_per_s: int


@record
@dataclass(frozen=True, slots=True)
class Efficiency:
    """What a class of kernels reaches of the peak rate, in thousandths."""

    kernel: str
    compute_permille: int
    memory_permille: int


@record
@dataclass(frozen=True, slots=True)
class Source:
    """Where a number comes from."""

    field: str
    text: str


@record
@dataclass(frozen=True, slots=True)
class Timing:
    """One kernel that was measured: an op by its name without overload, its sizes, and what it took.

    `sizes` are a trace op's `dims` for products, convolutions and attention, the bytes it moves for all others.
    """

    op: str
    dtype: str
    sizes: tuple[int, ...]
    ns: int


@value("hardware", 1)
@dataclass(frozen=True, slots=True)
class Hardware:
    """One GPU with its link to the host.

    `memory_bytes` is the card's memory as nvidia-smi shows it, `context_bytes` what of it a process never gets for its
    tensors: the driver's share, the CUDA context, the kernels of its libraries; `cudnn_bytes` what cuDNN's kernels take
    beyond that where convolutions of many kinds run. `cublas_workspace_bytes` is what torch
    allocates for cuBLAS in each thread that multiplies matrices. Bandwidths are bytes a second; `duplex_bytes_per_s` is
    what both directions of the link carry together when both are busy. `launch_ns` is the host's time to
    issue one op, `kernel_ns` the least time of a kernel on the device. `nvlink_bytes_per_s` is what NVLink carries
    between the GPUs of a node, each way, from each of them; 0 where there is none.

    A machine whose kernels were measured one by one (a CPU) has `timings`, which decide instead of the rates. There a
    block of `fresh_from_bytes` or more is new memory each time, and costs `page_ns` for every 4 KiB; 0 where not so.
    From the datasheet, and None where nobody looked it up: `sm_count` multiprocessors, an L2 cache of `l2_bytes`, the
    board's power limit and the process of its chip (which bound the rate that the cores for fp32 can sustain).
    """

    id: str
    name: str
    memory_bytes: int
    peaks: tuple[Peak, ...]
    dram_bytes_per_s: int
    d2h_bytes_per_s: int
    h2d_bytes_per_s: int
    duplex_bytes_per_s: int
    link_latency_ns: int
    launch_ns: int
    kernel_ns: int
    efficiencies: tuple[Efficiency, ...]
    sources: tuple[Source, ...]
    nvlink_bytes_per_s: int = 0
    timings: tuple[Timing, ...] = ()
    page_ns: int = 0
    fresh_from_bytes: int = 0
    sm_count: int | None = None
    l2_bytes: int | None = None
    power_watts: int | None = None
    process_nm: int | None = None
    context_bytes: int = 0
    cublas_workspace_bytes: int = 8_519_680
    cudnn_bytes: int = 0

    @property
    def available_bytes(self) -> int:
        """What every step can have: the card's memory less CUDA's context and cuDNN's kernels.

        Every command's and every policy's limit.
        """
        return self.memory_bytes - self.context_bytes - self.cudnn_bytes

    def peak(self, dtype: str) -> int:
        """Flops a second for a dtype; an unknown dtype runs at fp32's rate."""
        rates = {p.dtype: p.flops_per_s for p in self.peaks}
        return rates.get(dtype, rates["float32"])

    def fingerprint(self) -> str:
        """Sixteen hex digits that equal machines share."""
        return fingerprint(self)

    def check(self) -> None:
        """Name the first thing that is wrong.

        Raises:
            FormatError: a rate or a size is missing, zero or negative.
        """
        for name in (
            "memory_bytes",
            "dram_bytes_per_s",
            "d2h_bytes_per_s",
            "h2d_bytes_per_s",
            "duplex_bytes_per_s",
        ):
            if getattr(self, name) <= 0:
                raise FormatError(f"hardware {self.id!r}: {name} is {getattr(self, name)}, it must be more than 0")
        for name in (
            "link_latency_ns",
            "launch_ns",
            "kernel_ns",
            "nvlink_bytes_per_s",
            "context_bytes",
            "cublas_workspace_bytes",
            "cudnn_bytes",
        ):
            if getattr(self, name) < 0:
                raise FormatError(f"hardware {self.id!r}: {name} is {getattr(self, name)}, it must not be negative")
        for name in ("sm_count", "l2_bytes", "power_watts", "process_nm"):
            number = getattr(self, name)
            if number is not None and number <= 0:
                raise FormatError(f"hardware {self.id!r}: {name} is {number}, it must be more than 0, or left out")
        if self.available_bytes <= 0:
            taken = f"context_bytes is {self.context_bytes}" + f" and cudnn_bytes {self.cudnn_bytes}" * bool(
                self.cudnn_bytes
            )
            raise FormatError(f"hardware {self.id!r}: {taken}, which leaves nothing of memory_bytes")
        if not any(p.dtype == "float32" for p in self.peaks):
            raise FormatError(f"hardware {self.id!r} has no float32 peak")
        for p in self.peaks:
            if p.flops_per_s <= 0:
                raise FormatError(f"hardware {self.id!r}: peak of {p.dtype} is {p.flops_per_s}, it must be more than 0")
        for t in self.timings:
            if t.ns <= 0 or not t.sizes or min(t.sizes) < 0:
                raise FormatError(
                    f"hardware {self.id!r}: timing of {t.op} {t.sizes} is {t.ns} ns, it must be more than 0"
                )
        for e in self.efficiencies:
            if not (0 < e.compute_permille <= 1000 and 0 < e.memory_permille <= 1000):
                raise FormatError(f"hardware {self.id!r}: efficiency of {e.kernel} is not in 1 … 1000 thousandths")


def preset_ids() -> tuple[str, ...]:
    """Ids of the GPUs that vdnn knows."""
    folder = resources.files("vdnn.values") / "presets"
    return tuple(sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml")))


@functools.cache
def _preset(gpu: str) -> Hardware:
    text = (resources.files("vdnn.values") / "presets" / f"{gpu}.toml").read_text()
    return _from_toml(tomllib.loads(text), gpu)


def _from_toml(data: dict[str, Any], name: str) -> Hardware:
    """`[peaks]` is a table dtype → flops a second, `[sources]` a table field → text."""
    plain = dict(data)
    for table, columns in (("peaks", ("dtype", "flops_per_s")), ("sources", ("field", "text"))):
        entries = plain.get(table, {})
        if not isinstance(entries, dict):
            raise FormatError(f"{name}: [{table}] must be a table")
        plain[table] = [dict(zip(columns, item, strict=True)) for item in entries.items()]
    efficiencies = plain.get("efficiencies", {})
    if not isinstance(efficiencies, dict) or not all(isinstance(e, dict) for e in efficiencies.values()):
        raise FormatError(f"{name}: [efficiencies] must be a table of {{ compute_permille, memory_permille }}")
    plain["efficiencies"] = [{"kernel": kernel, **entry} for kernel, entry in efficiencies.items()]
    timings = plain.get("timings", [])
    if not isinstance(timings, list) or not all(isinstance(t, list) and len(t) == 4 for t in timings):
        raise FormatError(f"{name}: timings must be a list of [op, dtype, [sizes], ns]")
    plain["timings"] = [dict(zip(("op", "dtype", "sizes", "ns"), t, strict=True)) for t in timings]
    try:
        machine = decode(Hardware, plain)
        machine.check()
    except FormatError as error:
        raise FormatError(f"{name}: {error}; `vdnn list gpus` and the presets show what a machine has") from None
    return machine


def to_toml(machine: Hardware) -> str:
    """The text of a hardware file, which `hardware` reads back as it was."""

    def text(value: object) -> str:
        return json.dumps(value, ensure_ascii=False)  # a JSON string is a TOML string

    plain, tables = [], []
    for field in dataclasses.fields(machine):
        value = getattr(machine, field.name)
        if field.name in ("peaks", "efficiencies", "sources"):
            continue
        if field.name == "timings":
            rows = [f"    [{text(t.op)}, {text(t.dtype)}, {list(t.sizes)}, {t.ns}]," for t in value]
            plain += ["timings = [", *rows, "]"] if rows else []
        elif value is not None and value != field.default:
            plain.append(f"{field.name} = {text(value) if isinstance(value, str) else f'{value:_}'}")
    tables += ["", "[peaks] # dense, flops a second", *(f"{p.dtype} = {p.flops_per_s:_}" for p in machine.peaks)]
    for e in machine.efficiencies:
        tables += ["", f"[efficiencies.{e.kernel}] # thousandths of the peak, and of the DRAM bandwidth"]
        tables += [f"compute_permille = {e.compute_permille}", f"memory_permille = {e.memory_permille}"]
    tables += ["", "[sources]", *(f"{s.field} = {text(s.text)}" for s in machine.sources)]
    return "\n".join([*plain, *tables]) + "\n"


def hardware(gpu: str | Path | Hardware) -> Hardware:
    """A machine by preset id ("rtx4090"), or from a `.toml` or `.json` file.

    Raises:
        UsageError: no such preset; names the nearest.
        FormatError: a file with a missing, unknown or impossible number.
    """
    if isinstance(gpu, Hardware):
        return gpu
    text = str(gpu)
    if text.endswith((".json", ".json.gz")):
        loaded = load(text, "hardware")
        assert isinstance(loaded, Hardware)
        return loaded
    if text.endswith(".toml"):
        try:
            return _from_toml(tomllib.loads(Path(text).read_text()), text)
        except OSError as error:
            raise FormatError(f"cannot read {text}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise FormatError(f"{text} is not TOML: {error}") from None
    if text.lower() not in preset_ids():
        raise unknown_name("GPU", text, preset_ids(), "or give a hardware file that ends in .toml or .json")
    return _preset(text.lower())
