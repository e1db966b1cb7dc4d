"""How `tests.strategies.traces` writes a valid training step: a chain of layers, op by op."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from vdnn.values import ModuleCall, Op, SavedTensor, Storage, Trace

__all__ = ["traces", "words"]

words = st.text(max_size=8)
_LAYERS = {
    "conv": ("Conv2d", "conv", "aten.convolution.default"),
    "norm": ("BatchNorm2d", "norm", "aten.native_batch_norm.default"),
    "activation": ("ReLU", "elementwise", "aten.relu.default"),
    "pool": ("MaxPool2d", "pool", "aten.max_pool2d_with_indices.default"),
    "dropout": ("Dropout", "elementwise", "aten.native_dropout.default"),
    "linear": ("Linear", "matmul", "aten.addmm.default"),
}
_DIMS = {"conv": (2, 3, 4, 1, 16, 9, 16), "matmul": (1, 2, 3, 4)}


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
