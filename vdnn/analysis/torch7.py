"""A step as Torch7 with cuDNN ran it, made from a captured one: the memory regime of the vDNN paper.

    one op a layer forward, one backward; of CONV two: the weights' gradient, then the input's
    a CONV saves its X, a POOL its X and Y (no indices), an in-place ACTV the Y it shares with its CONV
    concatenation copies; weights' gradients are not counted, as the paper does not

    as_torch7(trace)                       vDNN's: the feature extraction alone, FC layers neither held nor timed;
                                           X, dX, dY and workspace come and go with their layers
    as_torch7(trace, network_wide=True)    Torch's baseline: every weight and every X held throughout, gradients in
                                           buffers shared by all layers and sized to the largest dY: two, and a
                                           third where the network forks (paper, section IV)

The result is an ordinary `Trace`: policies plan it, the simulator runs it. Feature extraction ends at the last
CONV or POOL layer with what follows it in place; a network without any is taken whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vdnn.values.algorithms import GRADIENTS
from vdnn.values.trace import Category, Kernel, ModuleCall, Op, SavedTensor, Storage, Trace

__all__ = ["REGIMES", "as_torch7", "shared_buffers", "under"]

Regime = Literal["pytorch", "paper"]
REGIMES = ("pytorch", "paper")

_CORRECTION = "rewritten as Torch7 with cuDNN ran it: one op a layer, gradients by layer"
_FEATURES = ("conv", "pool")
# What PyTorch does not save is "temporary" in a captured step: Torch7 keeps every layer's result.
_MAPS = ("activation", "input", "temporary")


@dataclass(frozen=True, slots=True)
class _Layer:
    """One forward op that computes; `inputs` are feature maps, `weights` parameters and buffers."""

    op: int
    kind: str
    module: int
    inputs: tuple[int, ...]
    weights: tuple[int, ...]
    output: int
    in_place: bool


def under(regime: Regime, trace: Trace, policy: str) -> Trace:
    """The step as a memory regime has it: under "paper" without a policy (or `none`) Torch's baseline, else vDNN's."""
    if regime == "pytorch" or _CORRECTION in trace.corrections:
        return trace
    return as_torch7(trace, network_wide=policy in ("", "none", "none-m", "none-p"))


def as_torch7(trace: Trace, network_wide: bool = False) -> Trace:
    """The same step under the paper's memory regime."""
    layers = _layers(trace)
    return _Writer(trace, layers, _features(layers), network_wide).write()


def shared_buffers(trace: Trace) -> tuple[int, int]:
    """Number and size in bytes of the gradient buffers that all layers share."""
    layers = _layers(trace)
    consumers: dict[int, int] = {}
    for layer in layers:
        for x in () if layer.in_place else layer.inputs:
            consumers[x] = consumers.get(x, 0) + 1
    forks = any(count > 1 for count in consumers.values())
    return 2 + forks, max((trace.storages[layer.output].nbytes for layer in layers), default=0)


def _layers(trace: Trace) -> list[_Layer]:
    found = []
    for i, op in enumerate(trace.ops[: trace.forward_end]):
        if op.kernel == "view" or op.module < 0 or not op.writes:
            continue
        maps = [s for s in dict.fromkeys(op.reads) if trace.storages[s].category in _MAPS]
        output = op.writes[0]
        if op.kernel == "conv":
            kind = "conv"
        elif op.kernel == "copy" and len(maps) > 1:
            kind = "concat"
        else:
            kind = trace.modules[op.module].kind
        weights = tuple(s for s in dict.fromkeys(op.reads) if trace.storages[s].category in ("parameter", "buffer"))
        inputs = tuple(s for s in maps if s != output)
        found.append(_Layer(i, kind, op.module, inputs, weights, output, output in maps))
    return found


def _features(layers: Sequence[_Layer]) -> int:
    """How many of the layers are feature extraction."""
    last = max((i for i, layer in enumerate(layers) if layer.kind in _FEATURES), default=len(layers) - 1)
    while last + 1 < len(layers) and layers[last + 1].in_place and layers[last + 1].output == layers[last].output:
        last += 1
    return last + 1


class _Writer:
    """Writes the new step; indices of storages here are new ones."""

    def __init__(self, trace: Trace, layers: Sequence[_Layer], features: int, network_wide: bool) -> None:
        self.trace = trace
        self.layers = layers[:features]
        self.rest = layers[features:]
        self.network_wide = network_wide
        self.sizes: list[tuple[int, Category, str]] = []
        self.ops: list[Op] = []
        self.saved: list[SavedTensor] = []
        self.maps: dict[int, int] = {}  # storage there → storage here, of weights and feature maps
        self.gradients: dict[int, int] = {}  # feature map here → the storage of its gradient
        self.begin: dict[int, int] = {}
        self.end: dict[int, int] = {}
        self.back: dict[int, list[int]] = {}
        self.concats = {x: layer.output for layer in layers if layer.kind == "concat" for x in layer.inputs}
        self.late: dict[int, list[_Layer]] = {}  # a concatenation → the in-place layers before it

    def write(self) -> Trace:
        """The whole step."""
        for layer in self.layers:
            self._forward(layer)
        self.forward_ops = len(self.ops)
        unpacked = {}
        for layer in reversed(self.layers):
            here = len(self.ops)
            self._backward(layer)
            unpacked[layer.module] = here
            self.back.setdefault(layer.module, [here, here])[1] = len(self.ops)
        saved = tuple(replace(t, unpacked_at=(unpacked[t.module],)) for t in self.saved)
        if self.network_wide:
            for layer in self.rest:
                for there in (*layer.weights, *layer.inputs, layer.output):
                    self._map(there)
            count, nbytes = shared_buffers(self.trace)
            for _ in range(count):
                self._new(nbytes, "gradient", "shared gradient buffer")
        made = replace(
            self.trace,
            corrections=(*self.trace.corrections, _CORRECTION),
            optimizer="none",
            modules=tuple(self._module(i, call) for i, call in enumerate(self.trace.modules)),
            storages=self._storages(saved),
            ops=tuple(self.ops),
            saved=saved,
        )
        made.check()
        return made

    # -- parts -----------------------------------------------------------------------------------

    def _new(self, nbytes: int, category: Category, name: str = "") -> int:
        self.sizes.append((nbytes, category, name))
        return len(self.sizes) - 1

    def _map(self, there: int) -> int:
        if there not in self.maps:
            s = self.trace.storages[there]
            category: Category = "activation" if s.category == "temporary" else s.category
            self.maps[there] = self._new(s.nbytes, category, s.name)
        return self.maps[there]

    def _gradient(self, here: int) -> int:
        """The gradient of a feature map; its consumers add to one storage."""
        if here not in self.gradients:
            self.gradients[here] = self._new(self.sizes[here][0], "temporary")
        return self.gradients[here]

    def _op(
        self, layer: _Layer, name: str, kernel: Kernel, reads: Sequence[int], writes: Sequence[int], back: bool
    ) -> None:
        source = self.trace.ops[layer.op]
        moved = [sum(self.sizes[i][0] for i in set(side)) for side in (reads, writes)]
        kept = tuple(dict.fromkeys(reads)), tuple(dict.fromkeys(writes))
        self.ops.append(
            Op(
                name=name,
                phase="backward" if back else "forward",
                module=layer.module,
                kernel=kernel,
                dtype=source.dtype,
                dims=source.dims,
                reads=kept[0],
                writes=kept[1],
                flops=source.flops,
                read_bytes=moved[0],
                written_bytes=moved[1],
                workspace_bytes=0,
            )
        )

    def _save(self, layer: _Layer, here: int) -> None:
        nbytes = self.sizes[here][0]
        index = sum(t.module == layer.module for t in self.saved)
        node = f"{layer.kind.capitalize()}Backward"
        shape, position = (nbytes // 4,), len(self.ops)
        self.saved.append(SavedTensor(layer.module, index, here, "float32", shape, (1,), 0, nbytes, position, (), node))

    # -- layers ----------------------------------------------------------------------------------

    def _forward(self, layer: _Layer) -> None:
        source = self.trace.ops[layer.op]
        self.begin.setdefault(layer.module, len(self.ops))
        inputs = [self._map(x) for x in layer.inputs]
        weights = [self._map(w) for w in layer.weights]
        y = self._map(layer.output)
        if not layer.in_place and layer.kind != "concat":
            for x in inputs:
                self._save(layer, x)
        self._op(layer, source.name, source.kernel, [*inputs, *weights, *([y] if layer.in_place else [])], [y], False)
        self.end[layer.module] = len(self.ops)
        if layer.kind == "pool":
            self._save(layer, y)
        if layer.in_place:
            if layer.output in self.concats:  # its result is found again in the concatenation
                self.late.setdefault(self.concats[layer.output], []).append(layer)
            else:
                self._save(layer, y)
        for earlier in self.late.pop(layer.output, ()) if layer.kind == "concat" else ():
            self._save(earlier, y)

    def _held(self, layer: _Layer) -> int:
        """Where backward finds the result of an in-place layer."""
        return self.maps[self.concats.get(layer.output, layer.output)]

    def _backward(self, layer: _Layer) -> None:
        source = self.trace.ops[layer.op]
        y = self.maps[layer.output]
        dy = self._gradient(y)
        if layer.in_place:
            others = [self._gradient(self.maps[x]) for x in layer.inputs]  # of a sum: its other terms
            self._op(layer, source.name, source.kernel, [dy, self._held(layer)], [dy, *others], True)
            return
        inputs = [self.maps[x] for x in layer.inputs]
        weights = [self.maps[w] for w in layer.weights]
        dx = [self._gradient(x) for x in inputs]
        if layer.kind == "conv":
            self._op(layer, GRADIENTS[0], "conv", [dy, *inputs], [], True)
            self._op(layer, GRADIENTS[1], "conv", [dy, *inputs, *weights], dx, True)
        elif layer.kind == "concat":
            self._op(layer, source.name, "copy", [dy], dx, True)
        else:
            held = [y] if layer.kind == "pool" else []
            self._op(layer, source.name, source.kernel, [dy, *inputs, *held, *weights], dx, True)

    # -- lifetimes -------------------------------------------------------------------------------

    def _module(self, number: int, call: ModuleCall) -> ModuleCall:
        inside = [m for m in self.begin if self._is_inside(m, number)]
        begin = min((self.begin[m] for m in inside), default=self.forward_ops)
        end = max((self.end[m] for m in inside), default=self.forward_ops)
        back = [self.back[m] for m in inside if m in self.back]
        first, last = min((b[0] for b in back), default=-1), max((b[1] for b in back), default=-1)
        return replace(call, forward_begin=begin, forward_end=end, backward_begin=first, backward_end=last)

    def _is_inside(self, inner: int, outer: int) -> bool:
        while inner > outer:
            inner = self.trace.modules[inner].parent
        return inner == outer

    def _storages(self, saved: Sequence[SavedTensor]) -> tuple[Storage, ...]:
        n = len(self.ops)
        first, last, last_forward = [n] * len(self.sizes), [0] * len(self.sizes), [0] * len(self.sizes)
        for position, op in enumerate(self.ops):
            for i in (*op.reads, *op.writes):
                first[i] = min(first[i], position)
                last[i] = position + 1
                if op.phase == "forward":
                    last_forward[i] = position + 1
        need: dict[int, int] = {}
        for t in saved:
            need[t.storage] = min(need.get(t.storage, n), t.unpacked_at[0])
        made = []
        for i, (nbytes, category, name) in enumerate(self.sizes):
            wanted = need.get(i, -1)
            if self.network_wide and category == "temporary":  # its bytes are in the shared buffers
                made.append(Storage(0, category, name, first[i], last[i], -1, last[i], ""))
            elif self.network_wide or category in ("parameter", "buffer", "gradient"):
                made.append(
                    Storage(nbytes, category, name, -1, n, wanted, n, "the whole network" if wanted >= 0 else "")
                )
            else:
                alloc = -1 if category == "input" else first[i]
                release = last_forward[i] if wanted >= 0 else last[i]
                made.append(Storage(nbytes, category, name, alloc, release, wanted, last[i], ""))
        return tuple(made)
