"""How fast the simulator is: events a second in one process, and a whole `simulate_step`.

    python experiments/bench_sim.py [--blocks 400] [--repeat 5]

An event is an op, an action of the plan (copy out, release, fetch, wait) or an entry taken from the heap of
the copies. Views count as ops. The trace is synthetic; nothing of it is a measurement of a network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from vdnn.analysis.liveness import peak
from vdnn.analysis.moments import resolve
from vdnn.analysis.synthetic import conv_chain, transformer_chain
from vdnn.costs import op_times
from vdnn.policies import Options, decide
from vdnn.sim import simulate_step
from vdnn.sim.run import run
from vdnn.values import Trace, hardware


def best_s(work: Callable[[], object], repeat: int) -> float:
    """The shortest of some runs, in seconds."""
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def show(trace: Trace, repeat: int) -> None:
    """One line a rule and policy."""
    gpu = hardware("titan-x")
    times = op_times(trace, gpu)

    def line(rules: str, policy: str) -> None:
        plan = decide(policy, trace, gpu, Options(rules=rules, min_bytes=1 << 14))
        moves = resolve(plan, trace)
        events = run(trace, moves, times, gpu).events
        clock_s = best_s(lambda: run(trace, moves, times, gpu), repeat)
        memory_s = best_s(lambda: (resolve(plan, trace), peak(trace, moves)), repeat)
        whole_s = best_s(lambda: simulate_step(trace, plan, gpu), repeat)
        print(
            f"{trace.model:28} {rules:6} {policy:9} {len(moves):6} moves {events:8} events  "
            f"{events / clock_s:12,.0f} events/s on the clock  "
            f"{events / (clock_s + memory_s):12,.0f} with plan and memory  "
            f"{whole_s * 1e3:8.1f} ms simulate_step in all"
        )

    for rules in ("event", "paper"):
        for policy in ("none", "vdnn-all"):
            line(rules, policy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=400, help="blocks of the transformer, tenth of conv layers")
    parser.add_argument("--repeat", type=int, default=5, help="runs, of which the shortest counts")
    options = parser.parse_args()
    show(transformer_chain(blocks=options.blocks), options.repeat)
    show(conv_chain(channels=(16,) * (options.blocks * 10), pool_every=0), options.repeat)


if __name__ == "__main__":
    main()
