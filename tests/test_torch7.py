"""A step as Torch7 ran it: the paper's memory, from a captured step."""

from __future__ import annotations

import pytest

from vdnn.analysis.liveness import peak, requested
from vdnn.analysis.moments import resolve
from vdnn.analysis.synthetic import Tape, conv_chain, fork_join, transformer_chain
from vdnn.analysis.torch7 import as_torch7, shared_buffers, under
from vdnn.models import load
from vdnn.policies import Options, decide
from vdnn.tracing import capture_work
from vdnn.values import Trace, hardware

MIB = 2**20
TITAN = hardware("titan-x")
PAPER = Options(regime="paper")


def chain() -> Trace:
    """One CONV with its ReLU, one POOL, one FC: X 3·16·16, Y 4·16·16, pooled 4·8·8."""
    tape = Tape("chain", 2)
    x = tape.relu_("relu", tape.conv("conv", tape.input(2, 3, 16, 16), 4))
    return tape.finish(tape.linear("fc", tape.pool("pool", x), 10))


def test_mem_base_is_weights_and_feature_maps_and_two_buffers_of_the_largest_gradient() -> None:
    """Mem_base = ΣW + ΣX + 2·max(dY), without a workspace (paper, section IV)."""
    weights = 4 * 3 * 9 + 4 * 64 * 10
    maps = 2 * (3 * 256 + 4 * 256 + 4 * 64 + 10)
    step = as_torch7(chain(), network_wide=True)
    assert set(requested(step)) == {4 * (weights + maps + 2 * (2 * 4 * 256))}


def test_a_fork_takes_a_third_buffer() -> None:
    assert shared_buffers(conv_chain())[0] == 2
    assert shared_buffers(fork_join())[0] == 3


def test_vdnn_s_step_holds_the_feature_extraction_alone_layer_by_layer() -> None:
    """The last layer is the POOL. Its backward holds X, Y, dX, dY; W and the batch are there all the time."""
    step = as_torch7(chain())
    x, y, pooled, w = 2 * 3 * 256, 2 * 4 * 256, 2 * 4 * 64, 4 * 3 * 9
    by_op = dict(zip([f"{op.phase} {step.module_name(op.module)}" for op in step.ops], requested(step), strict=True))
    assert by_op["backward pool#0"] == 4 * (w + x + 2 * y + 2 * pooled)
    assert by_op["backward conv#0"] == 4 * (w + 2 * x + y), "Y is dropped first; X, dX, dY"
    assert not any("fc" in name for name in by_op)


def test_an_in_place_activation_shares_its_map_and_its_gradient() -> None:
    step = as_torch7(chain())
    relu = [op for op in step.ops if step.module_name(op.module) == "relu#0"]
    assert relu[0].reads == relu[0].writes
    assert relu[1].writes[0] in relu[1].reads
    saved = {step.module_name(t.module): t.storage for t in step.saved}
    assert saved["relu#0"] == relu[0].writes[0]


def test_conv_saves_x_and_pool_saves_x_and_y_and_no_indices() -> None:
    step = as_torch7(chain())
    assert [step.module_name(t.module) for t in step.saved] == ["conv#0", "relu#0", "pool#0", "pool#0"]
    assert {t.dtype for t in step.saved} == {"float32"}


def test_a_network_without_conv_layers_is_taken_whole() -> None:
    step = as_torch7(transformer_chain())
    assert step.module_name(step.ops[step.forward_end - 1].module) == "head#0"


def test_a_step_is_rewritten_once() -> None:
    step = under("paper", chain(), "vdnn-all")
    assert under("paper", step, "vdnn-all") is step
    assert under("pytorch", chain(), "none") == chain()
    assert under("paper", chain(), "none") != step


@pytest.mark.parametrize("policy", ["none", "vdnn-all-m", "vdnn-all-p", "vdnn-conv-m", "vdnn-conv-p", "vdnn-dyn"])
@pytest.mark.parametrize("make", [chain, conv_chain, fork_join])
def test_every_policy_plans_it_and_every_plan_resolves(policy: str, make) -> None:  # type: ignore[no-untyped-def]
    trace = make()
    plan = decide(policy, trace, TITAN, PAPER)
    step = under("paper", trace, policy)
    moves = resolve(plan, step)
    assert peak(step, moves).nbytes <= peak(step).nbytes + sum(move.nbytes for move in moves)


def test_the_fork_of_the_paper_is_offloaded_by_its_last_consumer() -> None:
    """Figure 3: the map that two layers read has Refcnt 2; it leaves when the second has run, and once."""
    trace = fork_join()
    step = under("paper", trace, "vdnn-all")
    moves = resolve(decide("vdnn-all", trace, TITAN, PAPER), step)
    shared = next(t.storage for t in step.saved if step.module_name(t.module) == "left#0")
    (move,) = [m for m in moves if m.storage == shared]
    right = next(call for call in step.modules if call.fqn == "right")
    left = next(call for call in step.modules if call.fqn == "left")
    assert move.release[0] == right.forward_end
    assert move.need is not None
    assert move.need[0] == right.backward_begin, "in backward the last consumer is the first to need it"
    assert step.storages[shared].free > left.backward_begin, "and the other one still finds it"


def test_googlenet_s_concatenations_are_copies_in_the_baseline_alone() -> None:
    """Torch7 keeps each branch's result beside the concatenated map; vDNN's step finds it in there again."""
    trace = capture_work(load("paper:googlenet", 4, image_size=64))
    wide, step = as_torch7(trace, network_wide=True), as_torch7(trace)
    joins = [op for op in step.ops if op.phase == "forward" and op.kernel == "copy"]
    assert len(joins) == 9
    joined = sum(op.written_bytes for op in joins)
    read = {t.storage for t in step.saved}
    maps = sum(s.nbytes for i, s in enumerate(step.storages) if i in read)
    held = sum(s.nbytes for s in wide.storages if s.category in ("activation", "input"))
    # FC's output and dropout's are in the baseline alone
    assert maps + joined <= held <= maps + joined + 4 * 4 * 3000
