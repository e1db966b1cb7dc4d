"""The engine and `vdnn measure` on a CUDA that is made up: no call has a wrong name, number or type of arguments."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import vdnn
from tests import fake_cuda
from tests.fake_cuda import Driver, pretended_cuda
from vdnn.cli.main import app
from vdnn.engine.blocks import _generators, _random_as
from vdnn.engine.cuda import CudaDevice
from vdnn.engine.device import HostBlock
from vdnn.engine.hostpool import PAGE_BYTES, HostPool
from vdnn.errors import EngineError, UsageError
from vdnn.measuring import cuda as measuring
from vdnn.measuring import measure_device


@pytest.fixture
def driver() -> Iterator[Driver]:
    with pretended_cuda(devices=2) as driver:
        yield driver


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh())]
        return nn.Sequential(*layers), torch.randn(128, 64)


def gradients(model: nn.Module, x: Tensor, steps: int = 3) -> list[Tensor]:
    for _ in range(steps):
        model.zero_grad()
        model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


# -- the double itself -----------------------------------------------------------------------------


def parameters(function: object) -> list[tuple[str, object, object]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name not in ("self", "cls")]


@pytest.mark.parametrize("name", ["record_event", "wait_event", "wait_stream", "query", "synchronize"])
def test_a_pretended_stream_takes_what_torchs_takes(name: str) -> None:
    assert parameters(getattr(fake_cuda.Stream, name)) == parameters(getattr(torch.cuda.Stream, name))


@pytest.mark.parametrize("name", ["record", "wait", "query", "synchronize", "elapsed_time"])
def test_a_pretended_event_takes_what_torchs_takes(name: str) -> None:
    assert parameters(getattr(fake_cuda.Event, name)) == parameters(getattr(torch.cuda.Event, name))


def test_streams_and_events_are_made_as_torchs_are(driver: Driver) -> None:
    for ours, torchs in ((fake_cuda.Stream, fake_cuda.real.Stream), (fake_cuda.Event.__init__, torch.cuda.Event)):
        assert parameters(ours) == parameters(torchs)
    assert torch.cuda.Stream is fake_cuda.Stream


def test_what_the_driver_replaces_is_there_in_torch(driver: Driver) -> None:
    with mock.patch.object(torch.cuda, "_initialized", False):
        torch.cuda.init()  # what torch does at the first call goes through, too
    assert vars(driver.properties).keys() <= vars(torch._C._CudaDeviceProperties).keys()
    for name, count in (("cudaHostRegister", 3), ("cudaHostUnregister", 1)):
        said = getattr(torch._C._cudart, name).__doc__.splitlines()[0]
        assert said.count("SupportsInt,") + said.count("SupportsInt |") + said.count("SupportsInt)") == count
        assert said.endswith("-> torch._C._cudart.cudaError")
        assert len(parameters(getattr(driver, name))) == count
    assert int(torch._C._cudart.cudaError(712)) == 712


# -- the engine ------------------------------------------------------------------------------------


def test_a_wrapped_model_trains_and_every_copy_is_on_a_side_stream(driver: Driver) -> None:
    model, x = network()
    expected = gradients(model, x)
    vdnn.wrap(model, policy="vdnn-all", min_bytes=1024)
    found = gradients(model, x)
    assert all(map(torch.equal, found, expected))
    assert driver.copies == {("out", 1): 9, ("back", 2): 9}
    assert [size for size, _ in driver.registered.values()] == [3 * 128 * 64 * 4]
    assert driver.streams[0] == 0
    vdnn.unwrap(model)  # the collector need not run
    assert not driver.registered


@pytest.mark.parametrize("budget", [None, "128MB"])
def test_a_model_wrapped_within_the_memory_there_is_is_tracked(driver: Driver, budget: str | None) -> None:
    model, x = network()
    expected = gradients(model, x)
    vdnn.wrap(model, budget=budget)
    with vdnn.track(model) as tracker:
        found = gradients(model, x, 1)
    assert all(map(torch.equal, found, expected))
    assert tracker.result().gpu == "NVIDIA H200"
    assert "without offload" in str(vdnn.report(model)) or vdnn.report(model).offloaded_bytes


def test_vdnn_run_trains_on_a_card(driver: Driver) -> None:
    options = "-O layers=1 -O hidden=32 -O sequence=16 --batch 2 --steps 2 --min-bytes 1KiB --policy vdnn-all"
    done = CliRunner().invoke(app, f"run demo:transformer --gpu h200 --device cuda {options}".split())
    assert done.exit_code == 0, done.output
    assert "are torch.equal to those without offload" in done.output
    assert driver.copies["out", driver.made - 1] == driver.copies["back", driver.made] > 0


def test_a_step_by_rule_waits_for_nothing_on_the_host(driver: Driver) -> None:
    model, x = network()
    expected = gradients(model, x)
    with vdnn.offload(min_bytes=1024, model=model):
        model.zero_grad()
        loss = model(x).square().sum()
    torch.cuda.set_sync_debug_mode("error")
    loss.backward()
    assert all(map(torch.equal, [p.grad for p in model.parameters()], expected))
    assert driver.copies["out", 1]


def test_memory_that_the_driver_does_not_pin_leaves_no_error_for_the_next_kernel(driver: Driver) -> None:
    """It stayed the thread's last error, which torch raised at its next launch, as if that had failed."""
    model, x = network()
    expected = gradients(model, x)
    driver.refuse = PAGE_BYTES
    vdnn.wrap(model, policy="vdnn-all", min_bytes=1024)
    with pytest.warns(UserWarning, match="could not be pinned"):
        found = gradients(model, x)
    assert all(map(torch.equal, found, expected))
    assert (driver.pending, driver.registered, vdnn.report(model).host_pinned_bytes) == (0, {}, 0)
    assert driver.copies["out", 1] == 9


def test_the_devices_own_context_pins_whatever_device_is_current(driver: Driver) -> None:
    """The runtime makes a context, some hundred MB, on the device that is current."""
    torch.cuda.set_device(1)
    device = CudaDevice(0)
    block = device.host_block(PAGE_BYTES)
    assert isinstance(block, HostBlock)
    source = device.adopt(torch.arange(1024.0, device="cuda:0"), 0, PAGE_BYTES)
    device.copy_out(block, source)
    assert torch.equal(block.data, source.data)
    assert [where for _, where in driver.registered.values()] == [0]
    assert driver.copies == {("out", device.offload_stream.stream_id): 1}
    assert (torch.cuda.current_device(), torch.cuda.current_stream(0).stream_id) == (1, 0)
    device.give_back(block, None)
    del block, device
    gc.collect()
    assert not driver.registered


def test_a_forked_process_unpins_nothing(driver: Driver) -> None:
    device = CudaDevice()
    assert device.host_block(1) is not None
    with mock.patch("os.getpid", return_value=1):
        del device
        gc.collect()
    assert driver.registered


def test_pinned_memory_has_pages_of_its_own_which_no_forked_process_gets() -> None:
    """Linux copies pinned pages when a process forks: each worker of a data loader took as much again."""
    pinned, pageable = (HostPool(pin).take(5000) for pin in (lambda data: data, None))
    assert pinned is not None
    assert pageable is not None
    flags = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word, *rest = line.split()
        if "-" in word and not word.endswith(":"):
            first, last = (int(part, 16) for part in word.split("-"))
        elif word == "VmFlags:":
            flags |= {b: rest for b in (pinned, pageable) if first <= b.data.data_ptr() < last}
    assert "dc" in flags[pinned]
    assert "dc" not in flags[pageable]
    assert pinned.data.data_ptr() % PAGE_BYTES == 0


def test_a_device_that_failed_lets_its_memory_go(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    device = CudaDevice()
    assert device.host_block(1) is not None
    with mock.patch.object(torch._C, "_cuda_synchronize", side_effect=torch.AcceleratorError("illegal access")):
        del device
        gc.collect()
    assert not driver.registered
    assert "ignored" not in capsys.readouterr().err


def test_a_buffer_read_on_another_stream_is_not_handed_out_before_its_end(driver: Driver) -> None:
    device = CudaDevice()
    buffer = device.allocate(PAGE_BYTES)
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        device.use(buffer)
    device.drop(buffer, device.prefetch_stream)
    assert driver.recorded_streams == [other.stream_id, device.prefetch_stream.stream_id]


def test_a_capture_of_a_cuda_graph_is_refused(driver: Driver) -> None:
    model, x = network()
    vdnn.wrap(model, policy="vdnn-all", min_bytes=1024)
    driver.capturing = True
    with pytest.raises(EngineError, match="while a CUDA graph is captured"):
        model(x)
    driver.capturing = False
    gradients(model, x, 1)
    with pytest.raises(UsageError, match="has 2 CUDA devices"):
        CudaDevice(2)


def test_a_block_draws_what_its_own_gpu_drew_whichever_is_current(driver: Driver) -> None:
    """It was the current device's generator, in forward that of one GPU and in backward of another: other masks."""
    own, current = driver.generators
    torch.cuda.set_device(1)
    before, place = _generators(torch.device("cuda", 0)), torch.device("cuda", 0)
    drawn = torch.rand(4, generator=own)
    others = current.get_state()
    with _random_as(before, place):
        assert torch.equal(torch.rand(4, generator=own), drawn)
    assert not torch.equal(torch.rand(4, generator=own), drawn)
    assert torch.equal(current.get_state(), others)


# -- measuring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "a card that nobody knows"])
def test_a_gpu_is_measured_by_calls_that_torch_has(name: str) -> None:
    sizes = {"LINK_BYTES": 2**16, "DRAM_BYTES": 2**16, "PRODUCT": 32, "CONVOLUTION": (2, 4, 8)}
    with pretended_cuda(name, 80 * 10**9) as driver, mock.patch.multiple(measuring, **sizes):
        found = measure_device("cuda")
    found.check()
    assert found.memory_bytes == 80 * 10**9
    assert {"float32", "tf32", "float16", "bfloat16"} <= {peak.dtype for peak in found.peaks}
    said = {source.field: source.text for source in found.sources}
    assert name in said["d2h_bytes_per_s"]
    assert "product of 32 float32" in said["peaks"]
    streams = {stream for _, stream in driver.copies}
    assert {1, 2} <= streams
