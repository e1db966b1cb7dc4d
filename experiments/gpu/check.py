"""What a GPU says: correctness, link, time and memory of every policy, each beside its prediction.

    python experiments/gpu/check.py -o results/gpu/check.json          on a CUDA device, at most 8 minutes
    python experiments/gpu/check.py --virtual -o /tmp/check.json       the same path on a CPU, small, no timings

Started from the source tree. One JSON with everything measured, a short table last. Parts run in the order of
what they tell; a part that fails is recorded with its error, and the others go on. A part that would start after
the time is up is recorded as not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

import vdnn

POLICIES = ("none", "vdnn-conv", "vdnn-all")
BUDGET_S = 420  # a call may take 480 s; what runs when this is over must still end


def models(small: bool) -> list[tuple[str, dict[str, Any], str]]:
    """(name, load options, precision): in the precision that people use for each."""
    if small:
        return [
            ("paper:vgg16", {"batch": 2, "image_size": 64, "width": 0.125}, "fp32"),
            ("torchvision:resnet18", {"batch": 2, "image_size": 64}, "fp32"),
            ("demo:transformer", {"batch": 2}, "fp32"),
            ("demo:cnn", {"batch": 2}, "fp32"),
        ]
    return [
        ("paper:vgg16", {"batch": 128}, "fp32"),
        ("torchvision:resnet50", {"batch": 256}, "amp-bf16"),
        ("torchvision:vit_l_16", {"batch": 64}, "amp-bf16"),
        ("hf:gpt2-medium", {"batch": 8, "sequence": 1024}, "amp-bf16"),
    ]


class Check:
    """The parts, on one device."""

    def __init__(self, virtual: bool) -> None:
        self.virtual = virtual
        self.device = torch.device("cpu" if virtual else "cuda")
        self.hardware = "h200"
        self.started = time.perf_counter()

    def engine_device(self) -> Any:
        return vdnn.VirtualDevice(seed=1) if self.virtual else vdnn.CudaDevice()

    def sync(self) -> None:
        if not self.virtual:
            torch.cuda.synchronize()

    # -- parts -------------------------------------------------------------------------------------

    def link(self) -> dict[str, Any]:
        """Bandwidth of pinned copies: each way, and both ways at once (bytes a second, best of five)."""
        if self.virtual:
            return {"skipped": "no link on a CPU"}
        nbytes = 1 << 30
        host = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        card = [torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
        streams = [torch.cuda.Stream() for _ in range(2)]

        def best(ways: tuple[bool, bool]) -> float:
            times = []
            for _ in range(5):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                if ways[0]:
                    with torch.cuda.stream(streams[0]):
                        host[0].copy_(card[0], non_blocking=True)
                if ways[1]:
                    with torch.cuda.stream(streams[1]):
                        card[1].copy_(host[1], non_blocking=True)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
            return min(times)

        return {
            "d2h_bytes_per_s": round(nbytes / best((True, False))),
            "h2d_bytes_per_s": round(nbytes / best((False, True))),
            "duplex_bytes_per_s": round(2 * nbytes / best((True, True))),
        }

    def gradients(self) -> dict[str, Any]:
        """Outputs and gradients bit for bit as without offload: first baseline against baseline, then policies."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        found: dict[str, Any] = {}
        for name, options, precision in models(self.virtual):
            options = dict(options) if self.virtual else {**options, "batch": max(2, options["batch"] // 16)}
            first = self.step_tensors(name, options, precision, None)
            again = self.step_tensors(name, options, precision, None)
            if not equal(first, again):
                found[name] = {"reproducible": False}
                continue
            rows: dict[str, Any] = {"reproducible": True, "tensors": len(first)}
            for policy in POLICIES[1:]:
                rows[policy] = equal(first, self.step_tensors(name, options, precision, policy))
            found[name] = rows
        torch.use_deterministic_algorithms(False)
        return found

    def step_tensors(
        self, name: str, options: dict[str, Any], precision: str, policy: str | None
    ) -> list[torch.Tensor]:
        work = vdnn.load(name, **options)
        model = self.build(work, precision)
        if policy is not None:
            vdnn.wrap(model, policy=policy, device=self.engine_device(), min_bytes=1)
        tensors = []
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            loss = self.forward(work, model, precision)
            loss.backward()
            tensors += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        self.sync()
        return tensors

    def build(self, work: Any, precision: str) -> torch.nn.Module:
        torch.manual_seed(0)
        with self.device:
            model = work.build()
        return model.to(torch.bfloat16) if precision == "bf16" else model

    def forward(self, work: Any, model: torch.nn.Module, precision: str) -> torch.Tensor:
        args, kwargs = work.inputs(self.device)
        dtype = {"amp": torch.float16, "amp-bf16": torch.bfloat16}.get(precision)
        torch.manual_seed(1)
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            return work.loss(model(*args, **kwargs), work.targets(self.device))

    def measured(self) -> list[dict[str, Any]]:
        """Time, peaks and overlap of a training step under each policy, beside the prediction."""
        rows = []
        for name, options, precision in models(self.virtual):
            work = vdnn.load(name, **options)
            trace = vdnn.capture(work, precision=precision, optimizer="sgd", device=self.device.type)
            baseline_s = None
            for policy in POLICIES:
                plan = vdnn.plan(trace, hardware=self.hardware, policy=policy)
                predicted = vdnn.simulate(trace, plan, hardware=self.hardware)
                row: dict[str, Any] = {"model": name, "options": options, "precision": precision, "policy": policy}
                row["predicted"] = {
                    "peak_requested_bytes": predicted.peak_requested_bytes,
                    "iteration_time_ns": predicted.iteration_time_ns,
                    "offloaded_bytes": predicted.offloaded_bytes,
                }
                try:
                    row["measured"] = self.timed(work, precision, plan if policy != "none" else None)
                except torch.OutOfMemoryError as error:
                    row["out_of_memory"] = str(error).split(". ")[0]
                    rows.append(row)
                    continue
                seconds = row["measured"]["seconds"]
                baseline_s = seconds if policy == "none" else baseline_s
                row["slowdown"] = seconds / baseline_s if baseline_s else None
                rows.append(row)
        return rows

    def timed(self, work: Any, precision: str, plan: Any) -> dict[str, Any]:
        model = self.build(work, precision)
        if plan is not None:
            vdnn.wrap(model, plan=plan, device=self.engine_device())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def step() -> None:
            self.forward(work, model, precision).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for _ in range(1 if self.virtual else 3):
            step()
        self.sync()
        result: dict[str, Any] = {}
        if not self.virtual:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(1 if self.virtual else 5):
            begin = time.perf_counter()
            step()
            self.sync()
            times.append(time.perf_counter() - begin)
        result["seconds"] = sorted(times)[len(times) // 2]
        if not self.virtual:
            result["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            result["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
            stats = torch.cuda.memory_stats()
            result["peak_requested_bytes"] = stats.get("requested_bytes.all.peak")
            if plan is not None:
                result.update(self.overlap(step))
        if plan is not None:
            report = vdnn.report(model)
            result["offloaded_bytes_per_pass"] = report.offloaded_bytes // max(report.passes, 1)
            result["host_peak_bytes"] = report.host_peak_bytes
            result["mismatches"] = list(report.mismatches[:3])
        return result

    def overlap(self, step: Callable[[], None]) -> dict[str, Any]:
        """From the profiler's spans: time the link was busy, and how much of it while kernels ran."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            step()
            torch.cuda.synchronize()
        copies, kernels = [], []
        for event in prof.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.device_type() != torch.autograd.DeviceType.CUDA:
                continue
            span = (event.start_ns(), event.start_ns() + event.duration_ns())
            name = event.name()
            if "Memcpy DtoH" in name or "Memcpy HtoD" in name:
                copies.append(span)
            elif "Memcpy" not in name and "Memset" not in name:
                kernels.append(span)
        busy, shared = union(copies), union(copies) + union(kernels) - union(copies + kernels)
        return {"link_busy_ns": busy, "link_busy_while_computing_ns": shared}

    def limits(self) -> list[dict[str, Any]]:
        """Under 12 and 24 GB: a batch that runs out of memory without offload and trains with it."""
        if self.virtual:
            return [{"skipped": "no CUDA allocator on a CPU"}]
        total = torch.cuda.get_device_properties(0).total_memory
        rows = []
        for gb, name, options, precision in (
            (12, "paper:vgg16", {"batch": 128}, "fp32"),
            (24, "torchvision:resnet50", {"batch": 320}, "amp-bf16"),
        ):
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(gb * 10**9 / total)
            row: dict[str, Any] = {"limit_gb": gb, "model": name, "options": options, "precision": precision}
            work = vdnn.load(name, **options)
            trace = vdnn.capture(work, precision=precision, optimizer="sgd", device="cuda")
            for policy in ("none", "vdnn-all"):
                plan = None if policy == "none" else vdnn.plan(trace, hardware=self.hardware, policy=policy)
                try:
                    row[policy] = self.timed(work, precision, plan)
                except torch.OutOfMemoryError as error:
                    row[policy] = {"out_of_memory": str(error).split(". ")[0]}
                torch.cuda.empty_cache()
            rows.append(row)
        torch.cuda.set_per_process_memory_fraction(1.0)
        return rows


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def union(spans: list[tuple[int, int]]) -> int:
    """Total length covered by the spans."""
    covered, end = 0, 0
    for start, stop in sorted(spans):
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    return covered


def provenance(check: Check) -> dict[str, Any]:
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    gpu = "virtual" if check.virtual else torch.cuda.get_device_name()
    return {
        "command": "experiments/gpu/check.py",
        "commit": commit,
        "vdnn": vdnn.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": gpu,
        "source": "measured",
    }


def table(results: dict[str, Any]) -> str:
    lines = [f"{'model':28} {'policy':10} {'slowdown':>8} {'peak GiB':>9} {'predicted':>9} {'moved GiB':>9}"]
    for row in results["parts"].get("measured", {}).get("result") or []:
        got, said = row.get("measured", {}), row["predicted"]
        peak = got.get("peak_requested_bytes")
        lines.append(
            f"{row['model']:28} {row['policy']:10} "
            + (f"{row['slowdown']:8.3f} " if row.get("slowdown") else f"{'--':>8} ")
            + (f"{peak / 2**30:9.2f} " if peak else f"{'--':>9} ")
            + f"{said['peak_requested_bytes'] / 2**30:9.2f} {(said['offloaded_bytes'] or 0) / 2**30:9.2f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--virtual", action="store_true", help="small, on the CPU, to check the script itself")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    if not arguments.virtual and not torch.cuda.is_available():
        print("no CUDA device here: run with --virtual to check the script itself", file=sys.stderr)
        return 2
    check = Check(arguments.virtual)
    results: dict[str, Any] = {"provenance": provenance(check), "parts": {}}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in ("link", "gradients", "limits", "measured"):
        begin = time.perf_counter()
        if begin - check.started > BUDGET_S:
            results["parts"][name] = {"not_run": f"the {BUDGET_S} s were over"}
            continue
        try:
            part: dict[str, Any] = {"result": getattr(check, name)()}
        except Exception as error:
            part = {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc(limit=-3)}
        part["seconds"] = round(time.perf_counter() - begin, 1)
        results["parts"][name] = part
        print(f"{name}: {part['seconds']} s{'' if 'result' in part else '  FAILED ' + part['error']}", file=sys.stderr)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(f"Wrote {arguments.output}", file=sys.stderr)
    return 1 if any("error" in part for part in results["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
