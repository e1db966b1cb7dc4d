"""CUDA on a machine without: the real Python of `torch.cuda` above a driver that is made up here, on CPU tensors.

`torch.cuda`'s own functions run as they are, so a wrong name, number or type of arguments fails as it would on a GPU.
Replaced are the functions of `torch._C` below them, and `Stream` and `Event`, whose base classes need a driver; a test
holds their signatures against the installed torch's. Tensors are the CPU's: what is made on "cuda" says that it is
there, what is asked for on "cpu" or pinned says that it is the host's. So nothing here tells of time or order (the
virtual device does): only that every line runs, and that no call is one that torch does not have.

    with pretended_cuda() as driver: ...     driver.copies, driver.registered, driver.pending, ...
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.cuda import streams as real
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

__all__ = ["Driver", "Event", "Stream", "pretended_cuda"]

_CUDA = 1  # c10's number of the device type
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_HOST = "pretended_host"
PAGE = 4096


class Driver:
    """What the driver knows. `refuse` is the number of bytes from which on memory is not pinned."""

    def __init__(self, name: str, memory_bytes: int, devices: int) -> None:
        self.devices = devices
        self.current = 0
        self.streams = dict.fromkeys(range(devices), 0)  # id of the current one, by device
        self.made = 0
        self.pending = 0  # the thread's last error, until somebody takes it
        self.refuse: int | None = None
        self.capturing = False
        self.sync_mode = 0
        self.fraction = 1.0
        self.registered: dict[int, tuple[int, int]] = {}  # address: bytes, and on which device
        self.copies: Counter[tuple[str, int]] = Counter()  # "out" or "back", id of the stream
        self.recorded_streams: list[int] = []
        self.history: dict[str, Any] | None = None
        self.snapshot: dict[str, Any] = {"segments": [], "device_traces": [[]]}
        self.properties = SimpleNamespace(
            name=name,
            total_memory=memory_bytes,
            major=9,
            minor=0,
            multi_processor_count=132,
            L2_cache_size=60 * 2**20,
        )
        self.generators = tuple(torch.Generator() for _ in range(devices))

    def launch(self) -> None:
        """A kernel starts: torch looks whether it could, and finds whatever error is pending."""
        if self.pending:
            code, self.pending = self.pending, 0
            raise torch.AcceleratorError(f"CUDA error: {code}, of an earlier call")

    def waits(self) -> None:
        """The host waits for the device, in a way that torch reports."""
        if self.sync_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")

    def record_stream(self, tensor: Tensor, s: Stream) -> None:
        assert isinstance(s, Stream)
        self.recorded_streams.append(s.stream_id)

    # -- what torch._C has, by its names -----------------------------------------------------------

    def functions(self) -> dict[str, Callable[..., Any]]:
        return {
            "_cuda_init": lambda: None,
            "_cuda_getDeviceCount": lambda: self.devices,
            "_cuda_getDevice": lambda: self.current,
            "_cuda_setDevice": self._exchange,
            "_cuda_getCurrentStream": lambda index: (self.streams[index], index, _CUDA),
            "_cuda_getDefaultStream": lambda index: (0, index, _CUDA),
            "_cuda_setStream": self._set_stream,
            "_cuda_synchronize": lambda: None,
            "_cuda_sleep": self._sleep,
            "_cuda_emptyCache": lambda: None,
            "_cuda_memoryStats": lambda index: self._stats(),
            "_cuda_resetPeakMemoryStats": lambda index: None,
            "_cuda_hostMemoryStats": lambda: {"allocated_bytes": {"current": 0, "peak": 0}},
            "_cuda_resetPeakHostMemoryStats": lambda: None,
            "_cuda_setMemoryFraction": self._set_fraction,
            "_cuda_set_sync_debug_mode": self._set_sync_mode,
            "_cuda_record_memory_history": self._record_history,
            "_cuda_memorySnapshot": lambda mempool: self.snapshot,
            "_cuda_getArchFlags": lambda: "sm_90",
        }

    def _exchange(self, index: int) -> int:
        before = self.current
        if index >= 0:
            assert index < self.devices, f"no device {index}"
            self.current = index
        return before

    def _set_stream(self, stream_id: int, device_index: int, device_type: int) -> None:
        assert device_type == _CUDA
        self.streams[device_index] = stream_id
        self.current = device_index

    def _sleep(self, cycles: int) -> None:
        assert isinstance(cycles, int)
        self.launch()

    def _set_fraction(self, fraction: float, index: int) -> None:
        assert 0 <= index < self.devices
        self.fraction = fraction

    def _set_sync_mode(self, mode: int) -> None:
        self.sync_mode = mode

    def _record_history(self, enabled: str | None, context: str | None, stacks: str, max_entries: int, *_: Any) -> None:
        assert enabled in (None, "state", "all")
        assert context in (None, "state", "alloc", "all")
        assert stacks in ("python", "all")
        self.history = None if enabled is None else {"max_entries": max_entries}

    def _stats(self) -> dict[str, Any]:
        kinds = ("allocated_bytes", "reserved_bytes", "requested_bytes", "active_bytes")
        numbers = {kind: {"all": {"current": 0, "peak": 0, "allocated": 0, "freed": 0}} for kind in kinds}
        return {**numbers, "num_alloc_retries": 0, "num_ooms": 0}

    # -- the runtime, of which pybind's docstrings tell the arguments ------------------------------

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> Any:
        assert (type(address), type(nbytes), flags) == (int, int, 0)
        assert address % PAGE == nbytes % PAGE == 0, "not whole pages"
        taken = [(first, size) for first, (size, _) in self.registered.items()]
        assert all(address + nbytes <= first or first + size <= address for first, size in taken), "pinned already"
        if self.refuse is not None and nbytes >= self.refuse:
            self.pending = 2
            return torch._C._cudart.cudaError(2)  # as on a GPU: no int, and no member with a name
        self.registered[address] = nbytes, self.current
        return torch._C._cudart.cudaError(0)

    def cudaMemGetInfo(self, device: int) -> tuple[int, int]:
        assert 0 <= device < self.devices
        return self.properties.total_memory, self.properties.total_memory

    def cudaHostUnregister(self, address: int) -> Any:
        _, index = self.registered.pop(address)
        assert index == self.current, "the current device is another one, and would get a context"
        return torch._C._cudart.cudaError(0)


class Stream(torch.Stream):
    """`torch.cuda.Stream` without its base; comparing and hashing are torch's."""

    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Stream:
        if not kwargs:
            driver = _driver()
            driver.made += 1
            kwargs = {"stream_id": driver.made, "device_type": _CUDA}
            kwargs["device_index"] = torch.cuda._utils._get_device_index(device, optional=True)
        return super().__new__(cls, **kwargs)

    @property
    def cuda_stream(self) -> int:
        return int(self.stream_id)

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _driver().waits()


class Event:
    """`torch.cuda.Event`."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> None:
        self._timing = enable_timing
        self._at: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        assert stream is None or isinstance(stream, Stream)
        self._at = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        assert stream is None or isinstance(stream, Stream)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _driver().waits()

    def elapsed_time(self, end_event: Event) -> float:
        assert self._timing
        assert end_event._timing
        assert self._at is not None
        assert end_event._at is not None
        return (end_event._at - self._at) * 1e3


class _Tensors(TorchFunctionMode):
    """Calls that name a device, or ask for one, while no fake tensors are traced."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver
        self._own: dict[Any, Callable[..., Any]] = {
            Tensor.device.__get__: _device_of,
            Tensor.is_cuda.__get__: lambda t: _device_of(t).type == "cuda",
            Tensor.is_cpu.__get__: lambda t: _device_of(t).type == "cpu",
            Tensor.get_device: lambda t: 0 if _device_of(t).type == "cuda" else -1,
            Tensor.to: self._to,
            Tensor.cpu: lambda t, memory_format=torch.preserve_format: self._to(t, "cpu"),
            Tensor.cuda: lambda t, device=None, non_blocking=False: self._to(t, "cuda"),
            Tensor.pin_memory: lambda t: _on_host(t.clone()),
            Tensor.is_pinned: lambda t: _device_of(t).type == "cpu",
            Tensor.copy_: self._copy,
            Tensor.item: self._read,
            Tensor.tolist: self._read,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch._C._get_dispatch_mode(_FAKE) is not None or any(issubclass(kind, FakeTensor) for kind in types):
            return func(*args, **kwargs)
        own = self._own.get(func)
        if own is not None:
            return self._read(*args, what=func) if own == self._read else own(*args, **kwargs)
        pinned = bool(kwargs.pop("pin_memory", False))
        place = kwargs.get("device")
        if isinstance(place, int):
            place = f"cuda:{place}"
        if place is not None and torch.device(place).type == "cuda":
            self._driver.launch()
            kwargs["device"] = "cpu"
        found = func(*args, **kwargs)
        if isinstance(found, Tensor) and (pinned or (place is not None and torch.device(place).type == "cpu")):
            _on_host(found)
        return found

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            place, dtype, form = _device_of(args[0]), args[0].dtype, None
        else:
            place, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
        found = tensor if dtype is None else tensor.to(dtype)
        found = found if form is None else found.to(memory_format=form)
        if place is None or (place.type == _device_of(tensor).type and not copy):
            return _like(found, tensor) if place is None or place.type == "cpu" else found
        found = found.clone()
        return _on_host(found) if place.type == "cpu" else found

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        there, here = _device_of(target).type, _device_of(source).type
        if there != here:
            way = "out" if there == "cpu" else "back"
            self._driver.copies[way, self._driver.streams[self._driver.current]] += 1
            if not non_blocking:
                self._driver.waits()
        return target.copy_(source)

    def _read(self, tensor: Tensor, *args: Any, what: Any) -> Any:
        if _device_of(tensor).type == "cuda":
            self._driver.waits()
        return what(tensor, *args)


def _device_of(tensor: Tensor) -> torch.device:
    device = tensor.device
    if device.type != "cpu" or tensor.layout is not torch.strided:
        return device
    return device if getattr(tensor.untyped_storage(), _HOST, False) else torch.device("cuda", 0)


def _on_host(tensor: Tensor) -> Tensor:
    setattr(tensor.untyped_storage(), _HOST, True)
    return tensor


def _like(found: Tensor, tensor: Tensor) -> Tensor:
    return _on_host(found) if _device_of(tensor).type == "cpu" else found


def _inside(mode: _Tensors, hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A hook that autograd calls from inside an op, where torch has taken the op's mode off."""

    def called(value: Any) -> Any:
        if mode in _get_current_function_mode_stack():  # a hook inside a hook
            return hook(value)
        with mode:
            return hook(value)

    return called


_DRIVERS: list[Driver] = []


def _driver() -> Driver:
    return _DRIVERS[-1]


@contextlib.contextmanager
def pretended_cuda(name: str = "NVIDIA H200", memory_bytes: int = 150 * 10**9, devices: int = 1) -> Iterator[Driver]:
    """CUDA devices inside the block."""
    driver = Driver(name, memory_bytes, devices)
    _DRIVERS.append(driver)
    # fake tensors "on cuda" have streams, of a guard that torch puts in where there is no driver: it believes there is
    torch._C._ensureCUDADeviceGuardSet()
    with contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, value: Any, create: bool = False) -> None:
            stack.enter_context(mock.patch.object(owner, name, value, create=create))

        for function, body in driver.functions().items():
            put(torch._C, function, body)
        put(torch.cuda, "_exchange_device", driver._exchange)
        put(torch.cuda, "_maybe_exchange_device", driver._exchange)
        put(torch.cuda, "_get_device_properties", lambda index: driver.properties, create=True)
        put(torch.cuda.graphs, "_cuda_isCurrentStreamCapturing", lambda: driver.capturing)
        put(torch.cuda, "_cudart", driver)
        put(torch.cuda, "_initialized", True)
        put(torch.cuda, "_cached_device_count", None)
        put(torch.cuda, "default_generators", driver.generators)
        for owner in (torch.cuda, real):
            put(owner, "Stream", Stream)
            put(owner, "Event", Event)
        frombuffer = torch.frombuffer  # which no mode sees
        put(torch, "frombuffer", lambda *args, **kwargs: _on_host(frombuffer(*args, **kwargs)))
        put(Tensor, "record_stream", lambda tensor, s: driver.record_stream(tensor, s))  # comes from destructors, too
        mode, hooks = _Tensors(driver), torch.autograd.graph.saved_tensors_hooks
        begin = hooks.__init__
        put(hooks, "__init__", lambda self, pack, unpack: begin(self, _inside(mode, pack), _inside(mode, unpack)))
        stack.enter_context(mode)
        try:
            yield driver
        finally:
            gc.collect()  # what is pinned goes while the driver is there
            _DRIVERS.remove(driver)
