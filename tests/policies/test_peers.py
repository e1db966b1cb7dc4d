"""The peers' policies: worked out by hand, beside hooks that run, and what refuses them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import vdnn
from tests.sim.test_simulator import conv_chain_without_relu, one_byte_a_ns
from tests.strategies import hardwares, traces
from vdnn.analysis.liveness import requested
from vdnn.analysis.moments import resolve
from vdnn.analysis.synthetic import Tape, conv_chain
from vdnn.engine import Schedule
from vdnn.errors import EngineError, FormatError, UsageError
from vdnn.experiment import read_experiment
from vdnn.policies import Options, decide
from vdnn.sim import simulate_step
from vdnn.sim.run import run
from vdnn.sim.workspaces import with_libraries
from vdnn.values import Copy, Entry, Keep, Offload, Plan, Trace, dumps, hardware, loads

PEERS = ("save-on-cpu", "torchtune")


def test_save_on_cpu_worked_out_by_hand():
    """Two convolutions save 100 and 360 bytes (input, weight), then 1000 and 720; ops take 600 ns, a byte 1 ns.

    compute: copies –460 │ conv0 –1060 │ copies –2780 │ conv1 –3380 │ loss –3980 │ its backward –4580 │ copies back
             –6300 │ conv1's two –7500 │ copies back –7960 │ conv0's –8560
    memory during conv1's second op backward: weights 360 + 720, what came back 1000 + 720, output 200, its gradient
             200, gradients of conv1's input 1000 and weight 720: 4920, where the step without offload has 4300.
    """
    trace, machine = conv_chain_without_relu(), one_byte_a_ns()
    plan = decide("save-on-cpu", trace, machine)
    moves = resolve(plan, trace)
    times = run(trace, moves, [600] * 7, machine)
    assert (times.forward_ns, times.backward_ns, times.stall_ns) == (3980, 4580, 4360)
    assert requested(trace, moves) == [2180, 2280, 1284, 1480, 4200, 4920, 3820]
    assert max(requested(trace)) == 4300
    result = simulate_step(trace, plan, machine)
    assert result.peak_requested_bytes == 4920
    assert (result.offloaded_bytes, result.prefetched_bytes) == (2180, 2180)
    assert result.host_peak_bytes == 128 + 512 + 1024 + 1024  # powers of two
    assert plan.offloaded_bytes == 2180


def four_convolutions() -> tuple[Trace, Plan]:
    """Convolutions of 1000 bytes each: ops 0–3, loss 4; loss 5, then two ops each of conv3 … conv1, one of conv0 (12).

    Their inputs are copied with a stash of two packs, their weights are not (each counts as a pack, too).
    """
    tape = Tape("four_convolutions", 1)
    x = tape.input(1, 10, 5, 5)
    for i in range(4):
        x = tape.conv(f"conv{i}", x, 10)
    trace = tape.finish(x, optimizer=False)
    plan = decide("torchtune", trace, one_byte_a_ns())
    how = Copy("side", 2)
    entries = [replace(e, action=how if str(e.saved[0]).endswith("#0/0") else Keep()) for e in plan.entries]
    entries[-1] = replace(entries[-1], action=Keep())  # the loss's
    return trace, replace(plan, entries=tuple(entries))


def test_torchtune_worked_out_by_hand():
    """Ops take 600 ns, a copy 1000 ns; x0 is the batch, y0 … y2 are the outputs of conv0 … conv2.

    copies:  x0 0–1000 │ y0 –2000 │ y1 –3000 │ y2 –4000 │ back: y1 –5000 │ y0 –6000 │ x0 7200–8200
    compute: conv0 0–600, waits for x0 (–1000) │ conv1 –1600, waits for y0 (–2000) │ conv2 –2600, waits for y1 (–3000)
             │ conv3 –3600 │ loss –4200 │ its backward –4800 │ conv3 –6000 with y2, which is in the stash
             │ conv2 –7200 │ conv1 –8400 │ conv0 –9000
    The host runs ahead, so y1 and y0 come back as early as their stream gets there. x0's copy waits for the end of
    conv2's backward (7200), because it is issued after y1's buffer was given back, behind an event of that moment.
    """
    trace, plan = four_convolutions()
    machine = one_byte_a_ns()
    moves = resolve(plan, trace)
    assert [(m.release[0], m.fetch and m.fetch[0], m.until, m.behind) for m in moves] == [
        (1, 12, 13, 10),  # x0: let go of when y0 is packed; comes back for conv0, which is the last
        (2, 10, 13, -1),  # y0: for conv1, and lives while conv0's backward runs
        (3, 8, 12, -1),
        (8, None, 13, -1),  # y2 is found in the stash, which conv3's backward gives up at its end
    ]
    assert (run(trace, moves, [600] * 13, machine).total_ns, run(trace, moves, [600] * 13, machine).stall_ns) == (
        9000,
        1200,
    )
    result = simulate_step(trace, plan, replace(machine, kernel_ns=0), timeline=True)
    result.timeline.check()
    assert result.offloaded_bytes == 4000
    assert result.prefetched_bytes == 3000


def test_the_copy_back_of_torchtune_starts_when_the_host_has_issued_it():
    """As above with a host that takes 2000 ns for each op and copy: nothing runs ahead, every copy comes late.

    Ops and copies are issued in the order x0 conv0 y0 conv1 y1 conv2 y2 conv3 loss, its backward, conv3's two, y1,
    conv2's two, y0, conv1's two, x0, conv0's: 20 in all, so the last op starts at 40000. Compute asks for each of
    the three copies back when it is issued, and waits for all of its 1000 ns.
    """
    trace, plan = four_convolutions()
    machine = one_byte_a_ns(launch_ns=2000)
    times = run(trace, resolve(plan, trace), [600] * 13, machine, host_ns=[2000] * 13)
    assert times.total_ns == 40600
    assert times.stall_ns == 3000


def test_torchtunes_memory_worked_out_by_hand():
    """Four convolutions as above. Weights take 3600 bytes each (14400); y3 is the output, held to the end.

    op 3: x0 gone (released at position 1), y0 and y1 too (2, 3): y2, y3
    op 8: y1's copy back, y2 gone at its start (8); y3 and the gradients of y3's input so far: of y2, and of conv3's
          weight; the op makes that of y1
    """
    trace, plan = four_convolutions()
    live = requested(trace, resolve(plan, trace))
    assert live[3] == 14400 + 2000
    # weights, y3, y1 back, dy2 (kept to op 9), dw3, and dy1
    assert live[8] == 14400 + 1000 + 1000 + 1000 + 3600 + 1000
    # conv0's: y0 and x0 back, y3, dy0, dw3, dw2, dw1, and dw0; y1's buffer went at 12
    assert live[12] == 14400 + 2000 + 1000 + 1000 + 4 * 3600


def test_torchtune_leaves_parameters_alone_but_not_views_of_them():
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(512 // 8), nn.Linear(64, 512))
    trace = vdnn.capture(model, torch.randn(32, 64), device="cpu")
    plan = decide("torchtune", trace, hardware("rtx4090"))
    by_node = {
        (trace.storages[t.storage].category, t.stride): entry.action.action
        for t, entry in zip(trace.saved, plan.entries, strict=True)
        if trace.storages[t.storage].category == "parameter"
    }
    # the second Linear saves weight.t(), which is no Parameter; LayerNorm's weight is 256 bytes and one besides
    assert by_node[("parameter", (1, 64))] == "copy"
    assert by_node[("parameter", (1,))] == "keep"


class _Counting(torch.autograd.graph.saved_tensors_hooks):
    """Hooks that do what torchtune's do, with a log instead of copies: pack numbers let go of, found, fetched."""

    def __init__(self, size: int, least: int) -> None:
        self.log: list[tuple[str, int]] = []
        self.stash: list[int] = []
        self.packed = 0
        super().__init__(self._pack(size, least), self._unpack())

    def _pack(self, size, least):
        def pack(tensor):
            number, self.packed = self.packed, self.packed + 1
            if isinstance(tensor, nn.Parameter) or tensor.nbytes < least:
                return number, tensor, False
            for old in [n for n in self.stash if n <= number - size]:
                self.stash.remove(old)
                self.log.append(("gone", old))
            self.stash.append(number)
            self.log.append(("out", number))
            return number, tensor.clone(), True

        return pack

    def _unpack(self):
        def unpack(packed):
            number, tensor, copied = packed
            if copied:
                self.log.append(("found" if number in self.stash else "back", number))
                torch._C._current_autograd_node().register_hook(lambda outputs, inputs: self.stash.clear())
            return tensor

        return unpack


@pytest.mark.parametrize("size", [1, 2, 5])
def test_torchtunes_stash_is_that_of_hooks_in_a_real_step(size):
    """The order in which tensors go, are found and come back, from hooks of the same rules around a real model."""
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(32, 32), nn.GELU(), nn.LayerNorm(32))]
    model, x = nn.Sequential(*layers), torch.randn(16, 32)
    hooks = _Counting(size, 1024)
    with hooks:
        y = model(x)
    y.sum().backward()
    trace = vdnn.capture(model, x, loss=torch.sum, device="cpu")
    plan = decide("torchtune", trace, hardware("rtx4090"))
    entries = [replace(e, action=Copy("side", size)) if isinstance(e.action, Copy) else e for e in plan.entries]
    moves = resolve(replace(plan, entries=tuple(entries)), trace)
    numbers = {
        m.saved: n for m in moves for n in [[t for t, s in enumerate(trace.saved) if s.module >= 0].index(m.saved)]
    }
    ours: list[tuple[tuple[int, int], int, str, int]] = []
    for m in moves:
        ours.append((m.out, 1, "out", numbers[m.saved]))
        if m.release[0] <= trace.forward_end and m.release[1] >= 0:
            ours.append((m.release, 0, "gone", numbers[m.saved]))
        asked = min(trace.saved[m.saved].unpacked_at)
        ours.append(((asked, 2 * len(trace.saved) + m.saved), 0, "back" if m.fetch else "found", numbers[m.saved]))
    assert [(what, number) for _, _, what, number in sorted(ours)] == hooks.log


def test_save_on_cpu_copies_the_bytes_that_a_hook_sees():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 10))
    x, seen = torch.randn(2, 3, 8, 8), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    trace = vdnn.capture(model, x, device="cpu")
    assert decide("save-on-cpu", trace, hardware("rtx4090")).offloaded_bytes == sum(seen)


@settings(deadline=None)
@given(traces(), hardwares())
def test_a_peers_step_keeps_order_and_account(trace, machine):
    for name in PEERS:
        plan = decide(name, trace, machine)
        assert loads(dumps(plan)) == plan
        moves = resolve(plan, trace)
        result = simulate_step(trace, plan, machine, timeline=True)
        result.check()  # no two spans of one stream overlap
        assert replace(result, timeline=None) == simulate_step(trace, plan, machine)
        copies = sorted((s.start_ns, s.end_ns) for s in result.timeline.spans if s.stream in ("offload", "prefetch"))
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(copies))  # one at a time, whichever way
        most = now = sum(size for _, size in result.timeline.resident)
        for event in result.timeline.memory:
            if event.where == "device":
                now += event.nbytes
                most = max(most, now)
        assert most >= result.peak_requested_bytes == max(requested(with_libraries(trace, machine), moves), default=0)


@pytest.mark.parametrize("policy", PEERS)
def test_the_engine_refuses_what_only_the_simulator_does(policy, tmp_path):
    trace = conv_chain(batch=64)
    plan = decide(policy, trace, hardware("rtx4090"))
    with pytest.raises(EngineError, match="copies saved tensor by saved tensor"):
        Schedule(plan)
    for ask in (
        lambda: vdnn.wrap(nn.Linear(2, 2), policy=policy),
        lambda: vdnn.offload(policy=policy),
        lambda: vdnn.run(vdnn.load("demo:cnn", 2), policy=policy),
    ):
        with pytest.raises(UsageError, match="which vdnn only simulates: compare with it"):
            ask()
    sections = {kind: tmp_path / f"{kind}.toml" for kind in ("run", "simulate")}
    for kind, file in sections.items():
        file.write_text(
            f'title = "t"\n[[{kind}]]\ntitle = "s"\nmodels = ["demo:cnn"]\nbatches = [2]\ngpus = ["t4"]\n'
            f'policies = ["{policy}"]\n'
        )
    assert len(read_experiment(sections["simulate"]).cases) == 2
    with pytest.raises(UsageError, match="which vdnn only simulates"):
        read_experiment(sections["run"])
    with pytest.raises(UsageError, match="Torch7"):
        decide(policy, trace, hardware("titan-x"), Options(regime="paper"))


def test_a_plan_of_copies_has_one_way_and_an_entry_for_each_tensor():
    trace = conv_chain(batch=64)
    plan = decide("torchtune", trace, hardware("rtx4090"))
    first, second = (e for e in plan.entries[:2])
    for entries, message in (
        ((replace(first, action=Copy("side", 3)), second, *plan.entries[2:]), "in one way alone"),
        ((replace(first, action=Offload("end conv0#0")), *plan.entries[1:]), "in one way alone"),
        ((replace(first, action=Copy("side", 0)),), "a stash of 0"),
        ((replace(first, action=Copy("compute", 1)),), "a stash of 1"),
        ((Entry(first.saved + second.saved, first.storage_bytes, Copy("compute")),), "an entry for each"),
    ):
        with pytest.raises(FormatError, match=message):
            replace(plan, entries=entries).check()
