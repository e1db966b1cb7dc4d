"""How long capture and simulation take, beside the goals: in a new process and once more in one that has begun.

    python experiments/bench_capture.py

Cold is `vdnn simulate MODEL --no-cache`, from the start of the process to its end: ResNet-50 in 3 s, GPT-2 XL and
DenseNet-201 in 15 s on two cores. Of that, importing torch alone takes what the first line says. Warm is one capture
in a process that has captured before. `compare` is eight policies or more from one capture, cold.
Each number is the least of two.
"""

from __future__ import annotations

import subprocess
import sys
import time

import vdnn

CASES = (
    ("torchvision:resnet50", 64, "sgd", 3),
    ("torchvision:densenet201", 32, "sgd", 15),
    ("hf:gpt2-xl", 1, "adamw", 15),
)
_MAIN = "from vdnn.cli.main import main; main()"


def seconds(*command: str) -> float:
    """The least of two runs of a Python process."""
    found = []
    for _ in range(2):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    """Print seconds, ops and milliseconds an op of each model."""
    print(f"import torch: {seconds('-c', 'import torch, os; os._exit(0)'):.2f} s")
    vdnn.capture(vdnn.load("demo:cnn", batch=2))
    print(f"{'model':26} {'ops':>6} {'cold [s]':>9} {'goal':>5} {'compare [s]':>12} {'warm [s]':>9} {'ms an op':>9}")
    for name, batch, optimizer, goal in CASES:
        asked = (name, "--batch", str(batch), "--optimizer", optimizer, "--gpu", "a100-80", "--no-cache")
        cold = seconds("-c", _MAIN, "simulate", *asked)
        compare = seconds("-c", _MAIN, "compare", *asked)
        work = vdnn.load(name, batch=batch)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            trace = vdnn.capture(work, optimizer=optimizer)
            times.append(time.perf_counter() - start)
        ops, warm = len(trace.ops), min(times)
        print(f"{name:26} {ops:6} {cold:9.2f} {goal:5} {compare:12.2f} {warm:9.2f} {1e3 * warm / ops:9.2f}", flush=True)


if __name__ == "__main__":
    main()
