"""Hypothesis strategies for the five values. Everything they draw passes `check()`.

@given(traces())                 a step of a chain of layers, with skips, in-place layers, nested and repeated modules
@given(st.data())                plan = data.draw(plans_for(trace)): a plan whose names and points are the trace's
@given(plans()) hardwares() timelines() results()
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from vdnn.values import (
    OUTSIDE,
    STREAMS,
    Efficiency,
    Entry,
    Hardware,
    Keep,
    MemoryEvent,
    ModuleCall,
    Offload,
    Op,
    Peak,
    PeakItem,
    Plan,
    Provenance,
    RunResult,
    SavedName,
    SavedTensor,
    Source,
    Span,
    Stall,
    Storage,
    Timeline,
    Trace,
)

__all__ = ["hardwares", "plans", "plans_for", "results", "timelines", "traces"]

words = st.text(max_size=8)
sizes = st.integers(0, 1 << 40)
_LAYERS = {
    "conv": ("Conv2d", "conv", "aten.convolution.default"),
    "norm": ("BatchNorm2d", "norm", "aten.native_batch_norm.default"),
    "activation": ("ReLU", "elementwise", "aten.relu.default"),
    "pool": ("MaxPool2d", "pool", "aten.max_pool2d_with_indices.default"),
    "dropout": ("Dropout", "elementwise", "aten.native_dropout.default"),
    "linear": ("Linear", "matmul", "aten.addmm.default"),
}
_DIMS = {"conv": (2, 3, 4, 1, 16, 9, 16), "matmul": (1, 2, 3, 4)}


# -- traces --------------------------------------------------------------------------------------


@dataclass
class _Tensor:
    """A storage while its step is being written: who touched it, and when it was saved and asked for."""

    nbytes: int
    category: str
    name: str = ""
    born: int = -1
    touched: list[int] = field(default_factory=list)
    packed: list[int] = field(default_factory=list)
    unpacked: list[int] = field(default_factory=list)
    lasts: bool = False

    def storage(self, forward_end: int, end: int) -> Storage:
        free = end if self.lasts else max([self.born, *self.touched, *self.unpacked]) + 1
        if not self.packed:
            return Storage(self.nbytes, self.category, self.name, self.born, free, -1, free, "")  # type: ignore[arg-type]
        held = {"parameter": "parameter", "input": "input"}.get(self.category, "output" if self.lasts else "")
        in_forward = [t + 1 for t in (self.born, *self.touched) if t < forward_end]
        release = end if held else max(*in_forward, *self.packed)
        return Storage(
            self.nbytes,
            self.category,  # type: ignore[arg-type]
            self.name,
            self.born,
            release,
            min(self.unpacked),
            free,
            held,
        )


class _Step:
    """The step that is being written: ops, saved tensors and storages in the order they come up."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.tensors: list[_Tensor] = []
        self.saved: list[dict[str, Any]] = []
        self.packs: dict[int, int] = {}

    def new(self, tensor: _Tensor) -> _Tensor:
        self.tensors.append(tensor)
        return tensor

    def index(self, tensor: _Tensor) -> int:
        return next(i for i, t in enumerate(self.tensors) if t is tensor)

    def op(self, name: str, phase: str, module: int, kernel: str, reads: list[_Tensor], writes: list[_Tensor]) -> int:
        at = len(self.ops)
        for tensor in (*reads, *writes):
            tensor.touched.append(at)
        flops = 2 * sum(t.nbytes for t in reads) if kernel in ("conv", "matmul") else 0
        self.ops.append(
            Op(
                name,
                phase,  # type: ignore[arg-type]
                module,
                kernel,  # type: ignore[arg-type]
                "float32",
                _DIMS.get(kernel, (16,)),
                tuple(self.index(t) for t in reads),
                tuple(self.index(t) for t in writes),
                flops,
                sum(t.nbytes for t in reads),
                sum(t.nbytes for t in writes),
                512 if kernel == "conv" else 0,
            )
        )
        return at

    def pack(self, tensor: _Tensor, module: int, at: int, node: str) -> None:
        index = self.packs[module] = self.packs.get(module, -1) + 1
        tensor.packed.append(at)
        elements = tensor.nbytes // 4
        self.saved.append(
            {
                "tensor": tensor,
                "module": module,
                "index": index,
                "storage": self.index(tensor),
                "dtype": "float32",
                "shape": (elements,),
                "stride": (1,),
                "offset": 0,
                "nbytes": 4 * elements,
                "packed_at": at,
                "unpacked_at": (),
                "node": node,
            }
        )

    def unpack(self, module: int, at: int) -> list[_Tensor]:
        """The tensors that this module's backward asks for, before op `at`."""
        found = []
        for saved in self.saved:
            if saved["module"] == module:
                saved["unpacked_at"] = (*saved["unpacked_at"], at)
                saved["tensor"].unpacked.append(at)
                found.append(saved["tensor"])
        return found


@st.composite
def traces(draw: st.DrawFn, max_layers: int = 6) -> Trace:
    """A training step of a chain of layers: forward, loss, backward in reverse order, optimizer."""
    kinds = draw(st.lists(st.sampled_from(sorted(_LAYERS)), min_size=1, max_size=max_layers))
    nested = draw(st.booleans())
    optimizer = draw(st.sampled_from(["none", "sgd"]))
    nbytes = st.integers(1, 1 << 12).map(lambda n: 4 * n)
    step = _Step()
    x = step.new(_Tensor(draw(nbytes), "input", lasts=True))
    history = [x]
    parents = [0] if nested else []  # index of the container call that holds the layers
    calls: list[dict[str, Any]] = [{"fqn": "", "call": 0, "type": "Model", "kind": "container", "parent": -1}]
    if nested:
        calls.append({"fqn": "body", "call": 0, "type": "Sequential", "kind": "container", "parent": 0})
    seen: dict[str, int] = {}
    layers: list[tuple[int, _Tensor, _Tensor, _Tensor | None]] = []
    for number, kind in enumerate(kinds):
        type_name, kernel, op_name = _LAYERS[kind]
        again = kind == "activation" and draw(st.booleans())  # one ReLU module may be called many times
        fqn = ("body." if nested else "") + ("relu" if again else str(number))
        call, seen[fqn] = seen.get(fqn, 0), seen.get(fqn, 0) + 1
        module = len(calls)
        weight = None
        if kind in ("conv", "linear", "norm"):
            weight = step.new(_Tensor(draw(nbytes), "parameter", f"{fqn}.weight", lasts=True))
        in_place = kind == "activation" and x.category != "input" and draw(st.booleans())
        y = x if in_place else step.new(_Tensor(draw(nbytes), "activation", born=len(step.ops)))
        reads = [x, *([weight] if weight else [])]
        if len(history) > 1 and draw(st.booleans()):
            reads.append(draw(st.sampled_from(history[1:])))  # a skip connection
        begin = len(step.ops)
        if draw(st.booleans()):
            workspace = step.new(_Tensor(draw(nbytes), "temporary", born=begin + (0 if in_place else 1)))
            if in_place:
                step.op("aten.empty.memory_format", "forward", module, "other", [], [workspace])
            else:
                step.op(op_name, "forward", module, kernel, reads, [y])
                step.op("aten.mul.Tensor", "forward", module, "elementwise", [y], [workspace])
        if in_place or len(step.ops) == begin:
            step.op(op_name, "forward", module, kernel, reads, [y])
        at = len(step.ops)
        for tensor, is_saved in ((x, not in_place and draw(st.booleans())), (weight, True), (y, draw(st.booleans()))):
            if tensor is not None and is_saved:
                step.pack(tensor, module, at, f"{type_name}Backward0")
        calls.append(
            {"fqn": fqn, "call": call, "type": type_name, "kind": kind, "parent": 1 if nested else 0}
            | {"forward_begin": begin, "forward_end": at}
        )
        layers.append((module, x, y, weight))
        x = y
        if y not in history:
            history.append(y)
    for outer in range(1 + len(parents)):
        calls[outer] |= {"forward_begin": 0, "forward_end": len(step.ops)}
    x.lasts = draw(st.booleans())
    loss = step.new(_Tensor(4, "activation", born=len(step.ops)))
    step.op("aten.sum.default", "forward", -1, "reduce", [x], [loss])
    if draw(st.booleans()):
        step.pack(x, -1, len(step.ops), "SumBackward0")
    forward_end = len(step.ops)
    _backward(draw, step, layers, calls, x, loss, nbytes)
    for outer in range(1 + len(parents)):
        calls[outer] |= {"backward_begin": forward_end + 1, "backward_end": len(step.ops)}
    if optimizer == "sgd":
        for tensor in [t for t in step.tensors if t.category == "parameter"]:
            step.op("aten.add_.Tensor", "optimizer", -1, "elementwise", [tensor], [tensor])
    end = len(step.ops)
    trace = Trace(
        model=draw(st.sampled_from(["chain", "demo:chain"])),
        batch=draw(st.integers(1, 64)),
        precision="fp32",
        optimizer=optimizer,
        device=draw(st.sampled_from(["cuda", "cpu"])),
        channels_last=draw(st.booleans()),
        options=tuple(draw(st.lists(st.tuples(words, words), max_size=2))),
        torch="2.14.1",
        corrections=tuple(draw(st.lists(words, max_size=2))),
        modules=tuple(ModuleCall(**call) for call in calls),
        storages=tuple(t.storage(forward_end, end) for t in step.tensors),
        ops=tuple(step.ops),
        saved=tuple(SavedTensor(**{k: v for k, v in s.items() if k != "tensor"}) for s in step.saved),
    )
    trace.check()
    return trace


def _backward(
    draw: st.DrawFn,
    step: _Step,
    layers: list[tuple[int, _Tensor, _Tensor, _Tensor | None]],
    calls: list[dict[str, Any]],
    output: _Tensor,
    loss: _Tensor,
    nbytes: st.SearchStrategy[int],
) -> None:
    """Backward ops of the loss and of every layer, last layer first."""
    grad = step.new(_Tensor(output.nbytes, "gradient", born=len(step.ops)))
    asked = step.unpack(-1, len(step.ops))
    step.op("aten.expand.default", "backward", -1, "elementwise", [*asked, loss], [grad])
    for module, x, _, weight in reversed(layers):
        at = len(step.ops)
        asked = step.unpack(module, at)
        before = step.new(_Tensor(x.nbytes, "gradient", born=at))
        writes = [before]
        if weight is not None:
            writes.append(step.new(_Tensor(weight.nbytes, "gradient", weight.name, born=at, lasts=True)))
        kernel = step.ops[calls[module]["forward_end"] - 1].kernel
        step.op("aten.layer_backward.default", "backward", module, kernel, [grad, *asked], writes)
        if draw(st.booleans()):
            scratch = step.new(_Tensor(draw(nbytes), "temporary", born=len(step.ops)))
            step.op("aten.clone.default", "backward", module, "copy", [before], [scratch])
        calls[module] |= {"backward_begin": at, "backward_end": len(step.ops)}
        grad = before


# -- plans ---------------------------------------------------------------------------------------


def _name(trace: Trace, saved: SavedTensor) -> SavedName:
    call = trace.modules[saved.module] if saved.module >= 0 else None
    fqn, number = (call.fqn, call.call) if call is not None else (OUTSIDE, 0)
    return SavedName(fqn, number, saved.index, saved.dtype, len(saved.shape), saved.nbytes)


@st.composite
def plans_for(draw: st.DrawFn, trace: Trace) -> Plan:
    """A plan for this trace: storages that nobody holds are kept or offloaded, at points of the trace."""
    by_storage: dict[int, list[SavedTensor]] = {}
    for saved in trace.saved:
        by_storage.setdefault(saved.storage, []).append(saved)
    entries = []
    for storage, group in by_storage.items():
        names = tuple(_name(trace, saved) for saved in group)
        action: Keep | Offload = Keep("held" if trace.storages[storage].held else "")
        if not trace.storages[storage].held and draw(st.booleans()):
            last = names[-1]
            release = [f"pack {last}"] + ([f"end {last.module}#{last.call}"] if last.module != OUTSIDE else [])
            # backward asks for later packs first, so those are the points before this one's own unpack
            later = [s for s in trace.saved if s.packed_at >= group[-1].packed_at]
            points = ["", *(f"unpack {_name(trace, s)}" for s in later)]
            action = Offload(draw(st.sampled_from(release)), draw(st.sampled_from(points)), whole=draw(st.booleans()))
        entries.append(Entry(names, trace.storages[storage].nbytes, action))
    plan = Plan(
        policy="drawn",
        model=trace.model,
        batch=trace.batch,
        device=trace.device,
        trace=trace.fingerprint(),
        budget_bytes=draw(st.none() | st.integers(1, 1 << 40)),
        entries=tuple(entries),
        default=draw(st.sampled_from(["keep", "offload"])),
        min_bytes=draw(sizes),
        max_inflight_bytes=draw(sizes),
        notes=tuple(draw(st.lists(words, max_size=2))),
    )
    plan.check()
    return plan


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A plan for some trace."""
    return draw(plans_for(draw(traces())))


# -- hardware, timelines, results ----------------------------------------------------------------


@st.composite
def hardwares(draw: st.DrawFn) -> Hardware:
    """A machine with random, possible numbers."""
    rate = st.integers(10**6, 10**13)
    permille = st.integers(1, 1000)
    dtypes = draw(st.lists(st.sampled_from(["float16", "bfloat16", "tf32"]), unique=True))
    kernels = draw(st.lists(st.sampled_from(["conv", "matmul", "elementwise"]), unique=True))
    d2h, h2d = draw(rate), draw(rate)
    machine = Hardware(
        id=draw(words),
        name=draw(words),
        memory_bytes=draw(st.integers(1, 1 << 40)),
        peaks=tuple(Peak(d, draw(st.integers(10**9, 10**16))) for d in ["float32", *dtypes]),
        dram_bytes_per_s=draw(rate),
        d2h_bytes_per_s=d2h,
        h2d_bytes_per_s=h2d,
        duplex_bytes_per_s=draw(st.integers(max(d2h, h2d), d2h + h2d)),
        link_latency_ns=draw(st.integers(0, 10**6)),
        launch_ns=draw(st.integers(0, 10**6)),
        kernel_ns=draw(st.integers(0, 10**6)),
        efficiencies=tuple(Efficiency(k, draw(permille), draw(permille)) for k in kernels),
        sources=tuple(Source(f, draw(words)) for f in draw(st.lists(words, max_size=3, unique=True))),
    )
    machine.check()
    return machine


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """A timeline: per stream, spans that do not overlap."""
    length = st.integers(0, 10**6)
    clock = dict.fromkeys(STREAMS, 0)
    spans, stalls = [], []
    for stream in draw(st.lists(st.sampled_from(STREAMS), max_size=8)):
        start = clock[stream] + draw(length)
        clock[stream] = start + draw(length)
        if draw(st.booleans()):
            spans.append(Span(stream, draw(words), "forward", start, clock[stream], draw(sizes)))
        else:
            cause = draw(st.sampled_from(["release", "prefetch", "fetch", "layer", "launch"]))
            stalls.append(Stall(stream, cause, draw(words), start, clock[stream]))
    times = sorted(draw(st.lists(length, max_size=4)))
    memory = [
        MemoryEvent(
            t, i, draw(st.integers(-(1 << 30), 1 << 30)), "activation", draw(st.sampled_from(["device", "host"]))
        )
        for i, t in enumerate(times)
    ]
    resident = tuple(draw(st.lists(st.tuples(words, sizes), max_size=3)))
    timeline = Timeline(tuple(spans), tuple(stalls), tuple(memory), resident)
    timeline.check()
    return timeline


@st.composite
def results(draw: st.DrawFn) -> RunResult:
    """The result of a run, with any of its numbers unknown."""
    number = st.none() | sizes
    result = RunResult(
        source=draw(st.sampled_from(["simulated", "measured"])),
        model=draw(words),
        batch=draw(st.integers(1, 1024)),
        gpu=draw(words),
        policy=draw(words),
        precision="fp32",
        trace=draw(words),
        plan=draw(words),
        peak_requested_bytes=draw(number),
        peak_allocated_bytes=draw(number),
        peak_reserved_bytes=draw(number),
        iteration_time_ns=draw(number),
        forward_time_ns=draw(number),
        backward_time_ns=draw(number),
        stall_ns=draw(number),
        offloaded_bytes=draw(number),
        prefetched_bytes=draw(number),
        host_peak_bytes=draw(number),
        fits=draw(st.none() | st.booleans()),
        peak_at=draw(words),
        peak_items=tuple(PeakItem("activation", draw(words), draw(sizes)) for _ in range(draw(st.integers(0, 2)))),
        notes=tuple(draw(st.lists(words, max_size=2))),
        timeline=draw(st.none() | timelines()),
        provenance=Provenance(command=draw(words), seed=draw(st.none() | st.integers(0, 99))),
    )
    result.check()
    return result
