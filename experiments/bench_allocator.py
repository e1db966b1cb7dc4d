"""How fast the model of the CUDA caching allocator is: events a second, where an event is one `malloc` or `free`.

    python experiments/bench_allocator.py [--events 300000] [--repeat 5]

The histories are synthetic: blocks of random sizes that die at random (worst for the free sets), the memory of a
training step repeated, and both with torch's options. Each line is the best of the repeats, by the time of one process
(not of the clock on the wall: the machine may be shared).
"""

from __future__ import annotations

import argparse
import random
import time

from vdnn.sim.allocator import AddressSpace, AllocatorOptions, CachingAllocator

History = list[int]  # n > 0: allocate n bytes; −k: free the k-th allocation, counted from 1


def random_blocks(events: int, live: int, seed: int = 0) -> History:
    """Up to `live` blocks at once, of sizes from 100 bytes to 100 MB, that die in random order."""
    rng = random.Random(seed)
    history: History = []
    alive: list[int] = []
    made = 0
    while len(history) < events:
        if len(alive) < live and (not alive or rng.random() < 0.55):
            made += 1
            alive.append(made)
            history.append(int(10 ** rng.uniform(2, 8)))
        else:
            i = rng.randrange(len(alive))
            alive[i], alive[-1] = alive[-1], alive[i]
            history.append(-alive.pop())
    return history


def training_steps(events: int, layers: int = 100) -> History:
    """Forward makes an activation and a temporary a layer, backward frees them last first and makes gradients."""
    history: History = []
    made = 0

    def make(size: int) -> int:
        nonlocal made
        made += 1
        history.append(size)
        return made

    while len(history) < events:
        kept = []
        for layer in range(layers):
            kept.append(make((1 + layer % 7) * 3_000_000))
            history.append(-make(200_000 + 1000 * layer))
        upstream = make(4096)
        for layer in reversed(range(layers)):
            gradient = make((1 + layer % 7) * 3_000_000)
            history += [-kept[layer], -upstream]
            upstream = gradient
        history.append(-upstream)
    return history


def seconds(history: History, options: AllocatorOptions, repeat: int) -> tuple[float, CachingAllocator]:
    """The shortest of some runs over a fresh allocator."""
    best = float("inf")
    for _ in range(repeat):
        allocator = CachingAllocator(AddressSpace(), options)
        malloc, free = allocator.malloc, allocator.free
        addresses = [0]
        begin = time.process_time()
        for event in history:
            if event > 0:
                addresses.append(malloc(event))
            else:
                free(addresses[-event])
        best = min(best, time.process_time() - begin)
    return best, allocator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=300_000)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    plain = AllocatorOptions()
    cases = [
        ("training steps, 100 layers", training_steps(arguments.events), plain),
        ("random, up to 200 blocks", random_blocks(arguments.events, 200), plain),
        ("random, up to 2000 blocks", random_blocks(arguments.events, 2000), plain),
        ("random 200, max_split 128 MiB", random_blocks(arguments.events, 200), AllocatorOptions(128 << 20)),
        ("random 200, expandable", random_blocks(arguments.events, 200), AllocatorOptions(expandable_segments=True)),
    ]
    for name, history, options in cases:
        taken_s, allocator = seconds(history, options, arguments.repeat)
        print(
            f"{name:32} {len(history):8} events {len(history) / taken_s:10,.0f} events/s  "
            f"{allocator.total.reserved_bytes_peak / 2**30:6.2f} GiB reserved, {allocator.num_device_alloc} segments"
        )


if __name__ == "__main__":
    main()
