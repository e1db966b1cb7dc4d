"""What CUDA's libraries take from torch's allocator, and what a training's first step leaves to the next ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import vdnn
from vdnn.analysis.synthetic import conv_chain
from vdnn.sim.allocator_step import Script, step_memory
from vdnn.sim.first_step import first_step, later_step
from vdnn.sim.workspaces import allocatable_bytes, with_libraries
from vdnn.values import Trace, hardware

MIB = 2**20


def images(**how: object) -> Trace:
    """A convolution of 8 × 16 × 32 × 32 numbers with a kernel of 3 × 3, then a depthwise one."""
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16))
    return vdnn.capture(model, torch.randn(8, 16, 32, 32), **how)


def test_cublas_keeps_a_workspace_for_the_thread_of_forward_and_one_for_that_of_backward() -> None:
    trace = vdnn.capture(nn.Linear(8, 8), torch.randn(2, 8))
    for gpu, nbytes in (("rtx3090", 8_519_680), ("h100", 33_554_432), ("h200", 33_554_432)):
        held = with_libraries(trace, hardware(gpu)).storages[len(trace.storages) :]
        assert [s.nbytes for s in held] == [nbytes, nbytes]
    plain, without = (vdnn.simulate(t, hardware="rtx3090").peak_requested_bytes for t in (trace, images()))
    assert plain > 2 * 8_519_680 > without  # convolutions alone do not ask cuBLAS
    inference = vdnn.capture(nn.Linear(8, 8), torch.randn(2, 8), step="inference")
    assert len(with_libraries(inference, hardware("rtx3090")).storages) == len(inference.storages) + 1


def test_tensor_cores_get_nchw_tensors_transposed_in_cudnns_workspace() -> None:
    tensor, kernel = 8 * 16 * 32 * 32, 16 * 16 * 3 * 3
    trace = with_libraries(images(precision="amp"), hardware("rtx3090"))
    convolutions = [op for op in trace.ops if op.kernel == "conv"]
    whole = 2 * (2 * tensor + kernel)
    assert [op.workspace_bytes for op in convolutions] == [whole, 0, 0, whole]  # nothing for the depthwise one
    # nothing in NHWC, nothing on a card without tensor cores, nothing on a CPU
    for other, gpu in ((images(precision="amp", channels_last=True), "rtx3090"), (images(precision="amp"), "p100")):
        assert with_libraries(other, hardware(gpu)).ops == other.ops
    cpu = images(device="cpu")
    assert with_libraries(cpu, hardware("rtx3090")) is cpu


def test_a_chunk_of_the_channels_is_copied_before_it_is_convolved() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.chunk(2, dim=1)[1])

    trace = vdnn.capture(Halves(), torch.randn(4, 16, 32, 32))
    half = 4 * 8 * 32 * 32 * 4
    forward, backward = [op.workspace_bytes for op in trace.ops if op.kernel == "conv"]
    assert forward == half
    assert backward == 2 * half  # and so is the gradient of a sum, which is one number expanded
    assert any("not contiguous" in text for text in trace.corrections)
    whole = vdnn.capture(nn.Conv2d(8, 8, 3), torch.randn(4, 8, 32, 32), loss=lambda y: (y * y).sum())
    assert [op.workspace_bytes for op in whole.ops if op.kernel == "conv"] == [0, 0]
    on_cpu = vdnn.capture(Halves(), torch.randn(4, 16, 32, 32), device="cpu")
    assert all(op.workspace_bytes == 0 for op in on_cpu.ops)


def test_a_workspace_that_cannot_be_had_is_done_without() -> None:
    trace = conv_chain(batch=64)
    position = next(i for i, op in enumerate(trace.ops) if op.kernel == "conv")
    op = replace(trace.ops[position], workspace_bytes=1 << 40)
    greedy = replace(trace, ops=(*trace.ops[:position], op, *trace.ops[position + 1 :]))
    memory = step_memory(greedy, (), 1 << 30)
    assert memory.fits
    assert memory.without == (position,)
    plain = step_memory(trace, (), 1 << 30)
    assert (plain.peak_reserved_bytes, plain.without) == (memory.peak_reserved_bytes, ())


def test_a_copy_that_a_norm_reads_from_cannot_be_done_without() -> None:
    trace = vdnn.capture(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), torch.randn(4, 8, 32, 32))
    position = next(i for i, op in enumerate(trace.ops) if op.kernel == "norm")
    op = replace(trace.ops[position], workspace_bytes=1 << 40)
    copying = replace(trace, ops=(*trace.ops[:position], op, *trace.ops[position + 1 :]))
    assert step_memory(trace, (), 1 << 30).fits
    assert step_memory(copying, (), 1 << 30).failed_at == position


def test_all_peaks_are_of_the_run_in_which_workspaces_found_no_room() -> None:
    """The requested peak counted workspaces that the allocator's run had left out, and was above the allocated one."""
    trace = conv_chain(batch=64)
    position = next(i for i, op in enumerate(trace.ops) if op.kernel == "conv")
    op = replace(trace.ops[position], workspace_bytes=1 << 40)
    greedy = replace(trace, ops=(*trace.ops[:position], op, *trace.ops[position + 1 :]))
    result = vdnn.simulate(greedy, None, "t4")
    assert result.fits
    assert result.peak_requested_bytes <= result.peak_allocated_bytes <= result.peak_reserved_bytes < 1 << 34
    assert "1 convolution finds no room" in result.notes[0]


def test_in_the_first_step_gradients_and_states_are_made_where_the_step_left_room() -> None:
    trace = vdnn.capture(
        nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)),
        torch.randn(2, 64),
        optimizer="sgd",
        optimizer_impl="for-loop",
        zero_grad="in-place",
    )
    script = Script.of(trace, ())
    first, _ = first_step(trace, script)
    later, places = later_step(trace, script)
    kept = [i for i, s in enumerate(trace.storages) if s.category in ("gradient", "optimizer_state") and s.alloc < 0]
    assert len(kept) == 8  # two weights and two biases, a gradient and a momentum each
    parameters = [i for i, s in enumerate(trace.storages) if s.category == "parameter"]
    for piece in kept:
        assert first.index(piece) > max(map(first.index, parameters)) + 4
        assert piece not in later
    assert set(places) <= set(range(len(trace.ops) + 1))


def test_the_second_step_makes_and_frees_alike_so_that_any_number_of_steps_can_follow() -> None:
    trace = vdnn.capture(vdnn.load("demo:cnn", batch=4), optimizer="sgd")
    script = Script.of(trace, ())
    later, _ = later_step(trace, script)
    assert sorted(piece for piece in later if piece >= 0) == sorted(~piece for piece in later if piece < 0)


def test_benchmarking_cudnn_empties_the_cache_after_each_new_shape_of_the_first_step() -> None:
    """Two equal convolutions, forward and backward: two shapes."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
    calls = {}
    for on in (False, True):
        trace = vdnn.capture(model, torch.randn(2, 8, 16, 16, requires_grad=True), cudnn_benchmark=on)
        script = Script.of(trace, ())
        calls[on] = first_step(trace, script)[0].count(len(script.sizes))
    assert calls == {False: 0, True: 4}


def test_what_the_context_takes_is_not_the_steps() -> None:
    machine = hardware("rtx3090")
    assert machine.available_bytes == machine.memory_bytes - machine.context_bytes - machine.cudnn_bytes
    trace = vdnn.capture(nn.Linear(8, 8), torch.randn(2, 8))
    small = replace(machine, memory_bytes=machine.context_bytes + 10 * MIB, cudnn_bytes=0)
    assert not vdnn.simulate(trace, hardware=small).fits
    assert vdnn.simulate(trace, hardware=small, memory_limit=100 * MIB).fits


def test_a_network_with_few_convolutions_leaves_the_room_of_cudnn_s_kernels_to_tensors() -> None:
    machine = replace(hardware("rtx3090"), memory_bytes=1000 * MIB, context_bytes=100 * MIB, cudnn_bytes=300 * MIB)
    assert machine.available_bytes == 600 * MIB
    for count, there in ((1, 900), (4, 900), (5, 600)):
        layers = [nn.Conv2d(3 + i, 4 + i, 3, padding=1) for i in range(count)]
        trace = vdnn.capture(nn.Sequential(*layers), torch.randn(2, 3, 8, 8))
        assert allocatable_bytes(trace, machine) == there * MIB
        greedy = replace(trace, storages=(*trace.storages, replace(trace.storages[0], nbytes=700 * MIB)))
        assert vdnn.simulate(greedy, hardware=machine).fits == (count <= 4)
