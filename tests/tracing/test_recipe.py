"""How a step is run: each part of a recipe changes the trace in the way it changes the step on a GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import vdnn
from vdnn.errors import UsageError
from vdnn.values import Recipe, Trace, dumps, loads


class Attends(nn.Module):
    """One attention and a linear layer, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)
        self.unused = nn.Parameter(torch.zeros(1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.proj(x)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)


def captured(**how: object) -> Trace:
    return vdnn.capture(Attends(), torch.randn(2, 4, 8, 16), **how)


def names(trace: Trace, phase: str) -> list[str]:
    return [op.name for op in trace.ops if op.phase == phase]


def test_gradients_zeroed_in_place_are_there_before_the_step_and_backward_adds_to_them() -> None:
    kept = captured(optimizer="sgd", zero_grad="in-place")
    grads = [s for s in kept.storages if s.category == "gradient" and s.alloc < 0 and s.nbytes]
    weight, bias = 16 * 16 * 4, 16 * 4
    assert sorted(s.nbytes for s in grads) == [bias, weight]  # the unused parameter never had one
    assert all(s.free == len(kept.ops) for s in grads)
    assert any("zero_" in name for name in names(kept, "optimizer"))
    made = captured(optimizer="sgd")
    assert not [s for s in made.storages if s.category == "gradient" and s.alloc < 0]
    added = Counter(names(kept, "backward"))["aten.add_.Tensor"] - Counter(names(made, "backward"))["aten.add_.Tensor"]
    assert added == 2


def test_gradients_stay_allocated_without_an_optimizer_too() -> None:
    kept = captured(zero_grad="in-place")
    assert sum(s.nbytes for s in kept.storages if s.category == "gradient" and s.alloc < 0) == 16 * 16 * 4 + 16 * 4
    assert {name.split(".")[1] for name in names(kept, "optimizer")} in ({"zero_"}, {"_foreach_zero_"})


def test_attention_without_fused_kernels_is_two_products_and_a_softmax_that_autocast_runs_in_fp32() -> None:
    math = captured(precision="amp", attention="math")
    assert not [op for op in math.ops if op.kernel == "attention"]
    softmax = next(op for op in math.ops if op.name == "aten._softmax.default")
    assert math.storages[softmax.writes[0]].nbytes == 2 * 4 * 8 * 8 * 4
    assert "fused attention is off" in math.corrections[0]
    fused = captured(precision="amp")
    assert [op for op in fused.ops if op.kernel == "attention"]


def test_masks_are_added_or_filled_in_when_attention_is_in_parts() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            q = self.proj(x)
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    x = torch.randn(2, 4, 8, 16)
    filled = vdnn.capture(Masked(), x, torch.ones(8, 8, dtype=torch.bool), attention="math")
    added = vdnn.capture(Masked(), x, torch.zeros(8, 8), attention="math")
    assert "aten.masked_fill.Scalar" in names(filled, "forward")
    assert "aten.masked_fill.Scalar" not in names(added, "forward")


def test_attention_in_parts_computes_what_torch_computes() -> None:
    from vdnn.tracing.attention import attend_in_parts

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)
    whole = torch.nn.functional.scaled_dot_product_attention
    for how in (
        {"is_causal": True},
        {"attn_mask": torch.rand(8, 8) > 0.3, "scale": 0.5},
        {"attn_mask": torch.randn(8, 8)},
    ):
        torch.testing.assert_close(
            attend_in_parts(q, k, v, enable_gqa=True, **how), whole(q, k, v, enable_gqa=True, **how)
        )


@pytest.mark.parametrize(
    ("impl", "sign"), [("foreach", "aten._foreach_"), ("for-loop", "aten.add_."), ("fused", "aten._fused_sgd_")]
)
def test_the_optimizer_runs_in_the_implementation_that_is_named(impl: str, sign: str) -> None:
    ran = names(captured(optimizer="sgd-nesterov", optimizer_impl=impl), "optimizer")
    assert any(name.startswith(sign) for name in ran), ran
    assert impl == "for-loop" or len(ran) < 8


def test_nesterov_momentum_needs_a_temporary_of_each_gradient() -> None:
    def temporaries(optimizer: str) -> list[int]:
        trace = captured(optimizer=optimizer, optimizer_impl="for-loop")
        return sorted(s.nbytes for s in trace.storages if s.alloc >= trace.backward_end)

    assert temporaries("sgd") == []
    assert temporaries("sgd-nesterov") == [16 * 4, 16 * 16 * 4]


def test_backward_inside_autocast_sums_biases_in_fp32() -> None:
    """`sum` is on autocast's list of ops for fp32, and a bias' gradient is a sum."""

    def dtypes(**how: object) -> list[str]:
        model = nn.Sequential(nn.Linear(16, 16), nn.GELU())
        trace = vdnn.capture(model, torch.randn(8, 16), precision="amp", **how)
        made = [op for op in trace.ops if op.phase == "backward" and op.name.startswith("aten.sum")]
        return [str(trace.storages[op.writes[0]].nbytes // 16) for op in made]

    assert dtypes() == ["2"]
    assert dtypes(backward_autocast=True) == ["4"]


def test_inference_is_a_forward_in_evaluation_mode_that_saves_nothing() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.BatchNorm1d(16))
    trace = vdnn.capture(model, torch.randn(8, 16), step="inference")
    assert {op.phase for op in trace.ops} == {"forward"}
    assert not trace.saved
    assert not any("dropout" in op.name for op in trace.ops)
    assert model.training  # the model given is not touched
    assert trace.forward_end == trace.backward_end == len(trace.ops)


def test_every_policy_takes_a_trace_of_inference_and_offloads_nothing() -> None:
    trace = vdnn.capture(vdnn.load("demo:transformer", batch=2), step="inference", precision="amp")
    for policy in ("none", "vdnn-all", "vdnn-conv", "capuchin"):
        plan = vdnn.plan(trace, "rtx3090", policy)
        result = vdnn.simulate(trace, plan, "rtx3090", timeline=True)
        assert (result.offloaded_bytes, result.backward_time_ns, result.fits) == (0, 0, True)
        assert 0 < result.forward_time_ns <= result.iteration_time_ns


def test_inference_with_an_optimizer_is_refused() -> None:
    with pytest.raises(UsageError, match="inference has no optimizer"):
        captured(step="inference", optimizer="sgd")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"atention": "math"}, "atention"),
        ({"attention": "flash"}, "attention"),
        ({"cudnn_benchmark": "perhaps"}, "cudnn_benchmark=on"),
        ({"backward_autocast": 1}, "backward_autocast=on"),
    ],
)
def test_an_unknown_part_or_value_is_named(given: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Recipe.of(given)


def test_a_recipe_is_recorded_in_the_trace_and_its_file() -> None:
    trace = captured(cudnn_benchmark="on", zero_grad="in-place")
    assert trace.recipe == Recipe(cudnn_benchmark=True, zero_grad="in-place")
    assert loads(dumps(trace)).recipe == trace.recipe


def test_timm_models_hear_that_their_fused_attention_is_off_and_keep_the_setting_after() -> None:
    config = pytest.importorskip("timm.layers.config")
    before = config._USE_FUSED_ATTN
    trace = vdnn.capture(vdnn.load("timm:vit_tiny_patch16_224", batch=1, image_size=224), attention="math")
    assert before == config._USE_FUSED_ATTN
    assert Counter(op.name for op in trace.ops if op.phase == "forward")["aten._softmax.default"] == 12
