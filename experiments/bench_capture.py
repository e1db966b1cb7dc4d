"""How long a capture takes, beside the goals: at most 1 ms an op, ResNet-50 in 2 s, DenseNet-201 in 10 s on two cores.

    python experiments/bench_capture.py

The first capture of a process also imports what FakeTensorMode needs, some seconds; it is not counted here.
"""

from __future__ import annotations

import time

import vdnn

CASES = (
    ("torchvision:resnet50", 64, "sgd", 2.0),
    ("torchvision:densenet201", 32, "sgd", 10.0),
    ("hf:gpt2", 8, "adamw", None),
)


def main() -> None:
    """Print seconds, ops and milliseconds an op of each model."""
    vdnn.capture(vdnn.load("demo:cnn", batch=2))
    print(f"{'model':26} {'ops':>6} {'seconds':>8} {'goal':>6} {'ms an op':>9}  (goal 1.00)")
    for name, batch, optimizer, goal in CASES:
        work = vdnn.load(name, batch=batch)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            trace = vdnn.capture(work, optimizer=optimizer)
            times.append(time.perf_counter() - start)
        ops = len(trace.ops)
        print(f"{name:26} {ops:6} {min(times):8.2f} {goal or '--':>6} {1e3 * min(times) / ops:9.2f}")


if __name__ == "__main__":
    main()
