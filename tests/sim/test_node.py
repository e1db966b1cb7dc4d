"""Several GPUs in one machine: buckets as torch makes them, all-reduces and shared links worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import vdnn
from tests.sim.test_simulator import one_byte_a_ns
from tests.strategies import traces
from vdnn.analysis.dataparallel import BUCKET_BYTES, FIRST_BUCKET_BYTES, Bucket, data_parallel, grouped, ready_gradients
from vdnn.analysis.liveness import requested
from vdnn.analysis.moments import resolve
from vdnn.analysis.synthetic import Tape, conv_chain
from vdnn.cli.main import app
from vdnn.errors import UsageError
from vdnn.policies import Options, decide
from vdnn.sim import simulate_step
from vdnn.sim.allreduce import Ring, ring_of, share_of
from vdnn.sim.copies import OUT_WAY, REDUCE, CopyStreams
from vdnn.sim.run import run
from vdnn.values import Node, Trace, hardware, save

MIB = 1 << 20


def three_products() -> Trace:
    """Products with weights of 1 MiB: ops 0–2, loss 3; loss 4, then two each: fc2 5–6, fc1 7–8, fc0 9–10."""
    tape = Tape("three_products", 1)
    x = tape.input(1, 512)
    for i in range(3):
        x = tape.linear(f"fc{i}", x, 512)
    return tape.finish(x, optimizer=False)


@given(st.lists(st.integers(1, 12 * MIB // 4), max_size=40))
def test_buckets_are_those_that_torch_makes(elements):
    """`compute_bucket_assignment_by_size` is what DDP's reducer calls when it has seen the order of its gradients."""
    if not elements:
        assert grouped([]) == []
        return
    tensors = [torch.empty(n, device="meta") for n in elements]
    found, _ = torch.distributed._compute_bucket_assignment_by_size(
        tensors, [FIRST_BUCKET_BYTES, BUCKET_BYTES], [False] * len(tensors), list(range(len(tensors)))
    )
    assert grouped([4 * n for n in elements]) == found


def test_buckets_are_those_of_a_real_ddp():
    """DDP in a group of one process finds the order of its gradients in the first step, and fills its buckets anew."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(8)], torch.nn.Linear(1024, 200))
    x = torch.randn(2, 1024)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(3):
            ddp(x).sum().backward()
        found = ddp._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    finally:
        torch.distributed.destroy_process_group()
    trace = vdnn.capture(model, x, loss=torch.sum, device="cpu")
    assert [bucket.nbytes for bucket in data_parallel(trace, Node(2))[1]] == [int(size) for size in found.split(",")]


def test_a_step_with_its_buckets_worked_out_by_hand():
    """fc2's gradient fills the first bucket, those of fc1 and fc0 are the second's 2 MiB.

    Ops: 0–6 as before, 7 copies fc2's gradient in, 8–9 fc1, 10 copies in, 11–12 fc0, 13 copies in; 14 copies fc2's
    back, 15 and 16 those of the second bucket. Each takes 1000 ns, a MiB on the ring 4000 ns.
    First bucket 8000–12000. Second 14000–22000. Compute comes to 14 at 14000, copies to 15000, waits until 22000, and
    copies two more to 24000.
    """
    trace = three_products()
    step, buckets = data_parallel(trace, Node(2))
    step.check()
    assert [op.name for op in step.ops[7:]] == [
        *("copy into bucket", "mm", "mm", "copy into bucket", "mm", "mm", "copy into bucket"),
        *["copy from bucket"] * 3,
    ]
    assert buckets == (Bucket(MIB, 8, 14), Bucket(2 * MIB, 14, 15))
    ring = Ring(2, MIB * 10**9 // 4000, False)
    times = run(step, (), [1000] * 17, one_byte_a_ns(), None, buckets, ring)
    assert (times.forward_ns, times.total_ns, times.communication_ns, times.stall_ns) == (4000, 24000, 7000, 0)
    assert max(requested(step)) == max(requested(trace)) + 3 * MIB


def test_a_ring_on_the_link_halves_what_is_on_it_at_once():
    """A byte a ns each: out 0–500 alone; then both at half rate, out's other 500 bytes take to 1500; the ring has 500
    of its 1000 bytes by then, and the rest alone, to 2000. Over NVLink neither knows of the other."""
    for on_link, ends in ((True, [1500, 2000]), (False, [1000, 1500])):
        copies = CopyStreams(one_byte_a_ns(), 2, Ring(2, 10**9, on_link))
        copies.submit(0, OUT_WAY, 1000, 0)
        copies.submit(1, REDUCE, 1000, 500)
        copies.drain()
        assert copies.end == ends


def test_what_a_ring_sends_and_at_which_rate():
    assert Ring(8, 1, True).sent_bytes(1000) == 1750
    assert Ring(3, 1, True).sent_bytes(100) == 134  # 133⅓
    assert ring_of(hardware("a100-80"), Node(8, 4)) == Ring(8, 240 * 10**9, False)
    card = hardware("rtx4090")  # 40 GB/s both ways together
    assert ring_of(card, Node(4)) == Ring(4, 20 * 10**9, True)
    shared = share_of(card, Node(8, 4))
    assert (shared.d2h_bytes_per_s, shared.duplex_bytes_per_s) == (6_250_000_000, 10 * 10**9)
    assert ring_of(shared, Node(8, 4)) == Ring(8, 5 * 10**9, True)
    assert share_of(card, Node(8, 1)) == card


def test_gpus_that_share_a_link_copy_at_its_share():
    """A step of nothing but copies takes M times as long with M GPUs on the link."""
    trace = conv_chain()
    machine = one_byte_a_ns(dram_bytes_per_s=10**15)
    plan = decide("save-on-cpu", trace, machine)
    moves = resolve(plan, trace)
    nothing = [0] * len(trace.ops)
    times = [run(trace, moves, nothing, share_of(machine, Node(4, m))).total_ns for m in (1, 2, 4)]
    assert times == [times[0], 2 * times[0], 4 * times[0]]


@settings(deadline=None)
@given(traces())
def test_buckets_change_nothing_but_their_own_bytes(trace):
    """Every op of the step finds what it found before, and the buckets besides; plans mean the same."""
    step, buckets = data_parallel(trace, Node(4))
    step.check()
    own = [i for i, op in enumerate(step.ops) if not op.name.startswith("copy ") or "bucket" not in op.name]
    assert [step.ops[i] for i in own] == list(trace.ops)
    held = sum(bucket.nbytes for bucket in buckets)
    plan = decide("vdnn-all", trace, hardware("rtx4090"), Options(min_bytes=0))
    for before, after in (((), ()), (resolve(plan, trace), resolve(plan, step))):
        assert [requested(step, after)[i] - held for i in own] == requested(trace, before)
    assert all(bucket.ready <= bucket.wait for bucket in buckets)
    assert sorted(bucket.ready for bucket in buckets) == [bucket.ready for bucket in buckets]


@pytest.mark.parametrize("optimizer", ["none", "sgd"])
def test_the_gradients_that_are_summed_are_those_of_the_parameters(optimizer):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 5)
    )
    trace = vdnn.capture(model, torch.randn(2, 3, 8, 8), optimizer=optimizer)
    found = [trace.storages[storage].nbytes for _, storage in ready_gradients(trace)]
    assert sorted(found) == sorted(p.nbytes for p in model.parameters())
    assert found[-1] in (8 * 3 * 9 * 4, 8 * 4)  # the first layer's come last


def test_the_host_of_a_node_must_hold_what_all_of_its_gpus_pin():
    trace, machine = conv_chain(batch=64), hardware("rtx4090")
    plan = decide("vdnn-all", trace, machine, Options(min_bytes=0, keep_soon=False))
    each = simulate_step(trace, plan, machine).host_peak_bytes
    assert simulate_step(trace, plan, machine, node=Node(4, 2, 4 * each)).fits is True
    result = simulate_step(trace, plan, machine, node=Node(4, 2, 4 * each - 1))
    assert result.fits is False
    assert any("does not fit into the host: 4 GPUs pin" in note for note in result.notes)


def test_a_plan_for_a_budget_counts_the_buckets():
    trace, card = conv_chain(batch=64, channels=(16, 16, 64, 64)), "rtx4090"
    node = Node(4, 2)
    held = sum(bucket.nbytes for bucket in data_parallel(trace, node)[1])
    budget = (vdnn.simulate(trace, None, card).peak_requested_bytes or 0) + held // 2
    plan = vdnn.plan(trace, card, budget=budget, node=node, min_bytes=0)
    assert plan.trace == trace.fingerprint()
    actions = {entry.action.action for entry in plan.entries}
    assert actions - {"keep"}, "without the buckets it would fit as it is"
    assert vdnn.simulate(trace, plan, card, memory_limit=budget, node=node).fits is True


def test_a_nodes_timeline_has_the_all_reduces():
    trace, machine = three_products(), replace(hardware("titan-x"), launch_ns=0)
    result = simulate_step(trace, None, machine, node=Node(4, 4), timeline=True)
    result.timeline.check()
    spans = [s for s in result.timeline.spans if s.stream == "communication"]
    assert [(s.what, s.nbytes) for s in spans] == [("bucket 0", MIB), ("bucket 1", 2 * MIB)]
    waits = [s for s in result.timeline.stalls if s.cause == "all-reduce"]
    assert waits
    assert result.stall_ns == 0
    assert "communication" in result.timeline.streams
    assert "communication" not in simulate_step(trace, None, machine, timeline=True).timeline.streams


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (Node(0), "0 GPUs"),
        (Node(2, 4), "4 GPUs on a link, of 2"),
        (Node(2, 0), "0 GPUs on a link"),
        (Node(1, 1, 0), "0 b"),
    ],
)
def test_a_node_that_cannot_be_is_refused(node, message):
    with pytest.raises(UsageError, match=message):
        simulate_step(conv_chain(), None, hardware("rtx4090"), node=node)
    with pytest.raises(UsageError, match="DistributedDataParallel"):
        simulate_step(conv_chain(), None, hardware("titan-x"), node=Node(2), regime="paper")


def test_the_command_line_simulates_a_node(tmp_path: Path):
    save(conv_chain(batch=64), tmp_path / "step.json.gz")
    asked = ["compare", str(tmp_path / "step.json.gz"), "--gpu", "rtx4090", "--policy", "save-on-cpu", "--json"]
    times = []
    for node in ([], ["--gpus", "8"], ["--gpus", "8", "--gpus-per-link", "4"]):
        done = CliRunner().invoke(app, [*asked, *node])
        assert done.exit_code == 0, done.output
        times.append([row["iteration_time_ns"] for row in json.loads(done.stdout)])
    assert times[0][0] < times[1][0] < times[2][0]
    assert times[0][1] < times[1][1] < times[2][1]
    done = CliRunner().invoke(app, ["simulate", *asked[1:], "--gpus", "8", "--host-memory", "1MiB"])
    assert json.loads(done.stdout)["fits"] is False
    done = CliRunner().invoke(app, [*asked, "--gpus", "2", "--gpus-per-link", "3"])
    assert done.exit_code != 0
