"""Hand-made traces, for tests and for explaining: small networks whose step is written out by rule.

    conv_chain()          conv, relu in place, pool, …, linear, loss: the shape of the paper's networks
    fork_join()           one feature map with two consumers whose outputs are added
    transformer_chain()   norm, matmul, attention, residual additions: nothing for `vdnn-conv`

They follow PyTorch's habits: a convolution saves its input and weight, an in-place activation its result, a
pool its input and its indices; a gradient of a feature map is temporary. They are no measurement of anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from vdnn.values.trace import Category, Kernel, LayerKind, ModuleCall, Op, Phase, SavedTensor, Storage, Trace

__all__ = ["Tape", "Value", "conv_chain", "fork_join", "transformer_chain"]

_ITEM = 4  # bytes of a float32


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of the forward pass: its storage, its shape, and the gradient that backward has made for it so far."""

    storage: int
    shape: tuple[int, ...]
    gradient: int = -1

    @property
    def nbytes(self) -> int:
        """Dense bytes."""
        return _ITEM * math.prod(self.shape)


@dataclass(eq=False, slots=True)
class _Node:
    module: int
    saved: list[int]
    backward: Callable[[], None]


@dataclass(eq=False, slots=True)
class Tape:
    """Writes a trace: forward ops as they are called, then their backward in reverse, then the optimizer."""

    model: str
    batch: int
    modules: list[ModuleCall] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    saved: list[SavedTensor] = field(default_factory=list)
    nodes: list[_Node] = field(default_factory=list)
    gradients: dict[int, int] = field(default_factory=dict)
    phase: Phase = "forward"
    forward_end: int = 0
    _packs: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules.append(ModuleCall("", 0, "Model", "container", -1, 0, 0, -1, -1))

    # -- the parts of a trace --------------------------------------------------------------------

    def storage(self, nbytes: int, category: Category, name: str = "", before: bool = False) -> int:
        """A new storage, made by the next op, or there before the step."""
        alloc = -1 if before else len(self.ops)
        self.storages.append(Storage(nbytes, category, name, alloc, -1, -1, -1, ""))
        return len(self.storages) - 1

    def op(
        self,
        name: str,
        kernel: Kernel,
        reads: Sequence[int],
        writes: Sequence[int],
        module: int,
        flops: int = 0,
        dims: tuple[int, ...] = (),
        workspace: int = 0,
    ) -> None:
        """The next op; it moves every storage that it reads or writes once."""
        moved = [sum(self.storages[i].nbytes for i in set(side)) for side in (reads, writes)]
        where = tuple(dict.fromkeys(reads)), tuple(dict.fromkeys(writes))
        self.ops.append(
            Op(name, self.phase, module, kernel, "float32", dims, *where, flops, moved[0], moved[1], workspace)
        )

    def call(self, fqn: str, type_: str, kind: LayerKind) -> int:
        """Begin a call of a module, a child of the model."""
        number = sum(call.fqn == fqn for call in self.modules)
        here = len(self.ops)
        self.modules.append(ModuleCall(fqn, number, type_, kind, 0, here, here, -1, -1))
        return len(self.modules) - 1

    def save(self, module: int, storage: int, shape: tuple[int, ...], node: str, dtype: str = "float32") -> int:
        """Autograd packs a dense tensor of that storage now."""
        index = self._packs.get(module, 0)
        self._packs[module] = index + 1
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        nbytes = math.prod(shape) * (8 if dtype == "int64" else _ITEM)
        here = len(self.ops)
        self.saved.append(SavedTensor(module, index, storage, dtype, shape, stride, 0, nbytes, here, (), node))
        return len(self.saved) - 1

    def node(self, module: int, saved: list[int], backward: Callable[[], None]) -> None:
        """What backward does for the op just made; ends the module's forward call."""
        self.nodes.append(_Node(module, saved, backward))
        if module >= 0:
            self.modules[module] = replace(self.modules[module], forward_end=len(self.ops))

    def parameter(self, name: str, shape: tuple[int, ...]) -> Value:
        """A weight."""
        return Value(self.storage(_ITEM * math.prod(shape), "parameter", name, before=True), shape)

    def input(self, *shape: int) -> Value:
        """The batch."""
        return Value(self.storage(_ITEM * math.prod(shape), "input", before=True), shape)

    def give_gradient(
        self, value: Value, module: int, name: str, kernel: Kernel, reads: Sequence[int], flops: int
    ) -> None:
        """An op that makes the gradient of a value, and adds it to what other consumers gave."""
        made = self.storage(value.nbytes, "temporary")
        self.op(name, kernel, reads, [made], module, flops)
        if value.gradient >= 0:
            total = self.storage(value.nbytes, "temporary")
            self.op("add", "elementwise", [value.gradient, made], [total], module, math.prod(value.shape))
            made = total
        value.gradient = made

    def weight_gradient(
        self, weight: Value, module: int, name: str, kernel: Kernel, reads: Sequence[int], flops: int
    ) -> None:
        """An op that makes the gradient of a weight, which outlives the step."""
        made = self.storage(weight.nbytes, "gradient")
        self.gradients[weight.storage] = made
        self.op(name, kernel, reads, [made], module, flops)

    # -- layers ----------------------------------------------------------------------------------

    def conv(self, fqn: str, x: Value, out_channels: int, workspace: int = 0) -> Value:
        """A 3×3 convolution with stride 1 and padding 1."""
        batch, channels, height, width = x.shape
        weight = self.parameter(f"{fqn}.weight", (out_channels, channels, 3, 3))
        module = self.call(fqn, "Conv2d", "conv")
        saved = [self.save(module, v.storage, v.shape, "ConvolutionBackward0") for v in (x, weight)]
        shape = (batch, out_channels, height, width)
        y = Value(self.storage(_ITEM * math.prod(shape), "activation"), shape)
        flops = 2 * math.prod(shape) * channels * 9
        dims = (batch, channels, out_channels, 1, height * width, 9, height * width)
        self.op("convolution", "conv", [x.storage, weight.storage], [y.storage], module, flops, dims, workspace)
        first = not self.nodes

        def backward() -> None:
            if not first:  # nobody asks for the gradient of the batch
                self.give_gradient(
                    x, module, "convolution_backward", "conv", [y.gradient, weight.storage, x.storage], flops
                )
            self.weight_gradient(weight, module, "convolution_backward", "conv", [y.gradient, x.storage], flops)

        self.node(module, saved, backward)
        return y

    def relu_(self, fqn: str, x: Value) -> Value:
        """An activation in place: the result takes the storage of its input."""
        module = self.call(fqn, "ReLU", "activation")
        self.op("relu_", "elementwise", [x.storage], [x.storage], module, math.prod(x.shape))
        y = Value(x.storage, x.shape)
        saved = [self.save(module, y.storage, y.shape, "ReluBackward0")]

        def backward() -> None:
            reads = [y.gradient, y.storage]
            self.give_gradient(x, module, "threshold_backward", "elementwise", reads, math.prod(x.shape))

        self.node(module, saved, backward)
        return y

    def pool(self, fqn: str, x: Value) -> Value:
        """A 2×2 maximum pool with stride 2."""
        batch, channels, height, width = x.shape
        module = self.call(fqn, "MaxPool2d", "pool")
        shape = (batch, channels, height // 2, width // 2)
        first = self.save(module, x.storage, x.shape, "MaxPool2DWithIndicesBackward0")
        y = Value(self.storage(_ITEM * math.prod(shape), "activation"), shape)
        indices = self.storage(8 * math.prod(shape), "activation")
        self.op("max_pool2d", "pool", [x.storage], [y.storage, indices], module, math.prod(x.shape))
        saved = [first, self.save(module, indices, shape, "MaxPool2DWithIndicesBackward0", "int64")]

        def backward() -> None:
            reads = [y.gradient, x.storage, indices]
            self.give_gradient(x, module, "max_pool2d_backward", "pool", reads, math.prod(x.shape))

        self.node(module, saved, backward)
        return y

    def linear(self, fqn: str, x: Value, out_features: int) -> Value:
        """A matrix product over the last axis, or over all but the first of a picture."""
        rows, features = (x.shape[0], math.prod(x.shape[1:])) if len(x.shape) == 4 else (x.shape[0], x.shape[1])
        weight = self.parameter(f"{fqn}.weight", (out_features, features))
        module = self.call(fqn, "Linear", "linear")
        saved = [
            self.save(module, x.storage, (rows, features), "AddmmBackward0"),
            self.save(module, weight.storage, weight.shape, "AddmmBackward0"),
        ]
        y = Value(self.storage(_ITEM * rows * out_features, "activation"), (rows, out_features))
        flops = 2 * rows * features * out_features
        dims = (1, rows, out_features, features)
        self.op("addmm", "matmul", [x.storage, weight.storage], [y.storage], module, flops, dims)

        def backward() -> None:
            self.give_gradient(x, module, "mm", "matmul", [y.gradient, weight.storage], flops)
            self.weight_gradient(weight, module, "mm", "matmul", [y.gradient, x.storage], flops)

        self.node(module, saved, backward)
        return y

    def norm(self, fqn: str, x: Value) -> Value:
        """A layer norm without weights: saves its input."""
        module = self.call(fqn, "LayerNorm", "norm")
        saved = [self.save(module, x.storage, x.shape, "NativeLayerNormBackward0")]
        y = Value(self.storage(x.nbytes, "activation"), x.shape)
        self.op("native_layer_norm", "norm", [x.storage], [y.storage], module, 5 * math.prod(x.shape))

        def backward() -> None:
            reads = [y.gradient, x.storage]
            self.give_gradient(x, module, "native_layer_norm_backward", "norm", reads, 8 * math.prod(x.shape))

        self.node(module, saved, backward)
        return y

    def attention(self, fqn: str, qkv: Value) -> Value:
        """Attention of one head within each row's sequence; saves its input and output."""
        rows, width = qkv.shape
        module = self.call(fqn, "Attention", "attention")
        first = self.save(module, qkv.storage, qkv.shape, "ScaledDotProductFlashAttentionBackward0")
        shape = (rows, width // 3)
        y = Value(self.storage(_ITEM * math.prod(shape), "activation"), shape)
        tokens = rows // self.batch
        flops = 4 * self.batch * tokens * tokens * (width // 3)
        dims = (self.batch, 1, tokens, tokens, width // 3)
        self.op("scaled_dot_product_attention", "attention", [qkv.storage], [y.storage], module, flops, dims)
        saved = [first, self.save(module, y.storage, shape, "ScaledDotProductFlashAttentionBackward0")]

        def backward() -> None:
            reads = [y.gradient, qkv.storage, y.storage]
            self.give_gradient(qkv, module, "scaled_dot_product_attention_backward", "attention", reads, 5 * flops // 2)

        self.node(module, saved, backward)
        return y

    def add(self, a: Value, b: Value) -> Value:
        """A sum in the model's own code; it saves nothing, its gradient is that of both terms."""
        y = Value(self.storage(a.nbytes, "activation"), a.shape)
        self.op("add", "elementwise", [a.storage, b.storage], [y.storage], 0, math.prod(a.shape))

        def backward() -> None:
            for term in (a, b):
                self.give_gradient(term, 0, "clone", "copy", [y.gradient], 0)

        self.node(0, [], backward)
        return y

    # -- the end ---------------------------------------------------------------------------------

    def finish(self, output: Value, optimizer: bool = True) -> Trace:
        """Loss, backward and optimizer; then every lifetime from who touches what."""
        self.modules[0] = replace(self.modules[0], forward_end=len(self.ops))
        loss = Value(self.storage(_ITEM, "activation"), ())
        probabilities = self.save(-1, output.storage, output.shape, "LossBackward0")
        self.op("loss", "reduce", [output.storage], [loss.storage], -1, math.prod(output.shape))
        self.node(
            -1,
            [probabilities],
            lambda: self.give_gradient(
                output, -1, "loss_backward", "elementwise", [output.storage], math.prod(output.shape)
            ),
        )
        self.forward_end, self.phase = len(self.ops), "backward"
        freed: dict[int, int] = {}
        for node in reversed(self.nodes):
            begin = len(self.ops)
            for i in node.saved:
                self.saved[i] = replace(self.saved[i], unpacked_at=(begin,))
            node.backward()
            for i in node.saved:
                freed[i] = len(self.ops)
            if node.module > 0:
                call = self.modules[node.module]
                self.modules[node.module] = replace(call, backward_begin=begin, backward_end=len(self.ops))
        self.modules[0] = replace(self.modules[0], backward_begin=self.forward_end, backward_end=len(self.ops))
        self.phase = "optimizer"
        if optimizer:
            for weight, gradient in self.gradients.items():
                self.op("sgd", "elementwise", [weight, gradient], [weight], -1)
        trace = Trace(
            model=f"synthetic:{self.model}",
            batch=self.batch,
            precision="fp32",
            optimizer="sgd" if optimizer else "none",
            device="cuda",
            channels_last=False,
            options=(),
            torch="",
            corrections=("written by hand, not captured",),
            modules=tuple(self.modules),
            storages=self._lifetimes(freed, output.storage),
            ops=tuple(self.ops),
            saved=tuple(self.saved),
        )
        trace.check()
        return trace

    def _lifetimes(self, freed: dict[int, int], output: int) -> tuple[Storage, ...]:
        n = len(self.ops)
        last = [s.alloc + 1 for s in self.storages]
        last_forward = list(last)
        for position, op in enumerate(self.ops):
            for i in op.reads + op.writes:
                last[i] = position + 1
                if op.phase == "forward":
                    last_forward[i] = position + 1
        need = [n + 1] * len(self.storages)
        for i, t in enumerate(self.saved):
            last[t.storage] = max(last[t.storage], freed[i])
            need[t.storage] = min(need[t.storage], *t.unpacked_at)
        storages = []
        for i, s in enumerate(self.storages):
            stays = s.category in ("parameter", "gradient")
            free = n if stays or i == output else last[i]
            saved = need[i] <= n
            release = last_forward[i] if saved and not stays and i != output else free
            held = "output" if i == output else s.category if stays and saved else ""
            storages.append(replace(s, release=release, need=need[i] if saved else -1, free=free, held=held))
        return tuple(storages)


def conv_chain(
    channels: Sequence[int] = (16, 16, 32, 32), batch: int = 8, size: int = 32, pool_every: int = 2, classes: int = 10
) -> Trace:
    """conv, relu, conv, relu, pool, … and a linear classifier; `pool_every` 0 leaves the pools out."""
    tape = Tape("conv_chain", batch)
    x = tape.input(batch, 3, size, size)
    for i, width in enumerate(channels):
        x = tape.relu_(f"relu{i}", tape.conv(f"conv{i}", x, width))
        if pool_every and i % pool_every == pool_every - 1:
            x = tape.pool(f"pool{i}", x)
    return tape.finish(tape.linear("fc", x, classes))


def fork_join(batch: int = 8, size: int = 32, channels: int = 16) -> Trace:
    """A feature map that two convolutions consume; their outputs are added."""
    tape = Tape("fork_join", batch)
    stem = tape.relu_("stem.relu", tape.conv("stem.conv", tape.input(batch, 3, size, size), channels))
    left = tape.conv("left", stem, channels)
    right = tape.conv("right", stem, channels)
    joined = tape.add(tape.relu_("left.relu", left), tape.relu_("right.relu", right))
    return tape.finish(tape.linear("fc", tape.conv("head", joined, channels), 10))


def transformer_chain(blocks: int = 4, batch: int = 4, tokens: int = 128, width: int = 64) -> Trace:
    """Blocks of norm, matrix product, attention and a feed-forward pair, with residual additions."""
    tape = Tape("transformer_chain", batch)
    x = tape.linear("embed", tape.input(batch * tokens, width), width)
    for b in range(blocks):
        qkv = tape.linear(f"h.{b}.qkv", tape.norm(f"h.{b}.norm1", x), 3 * width)
        x = tape.add(x, tape.linear(f"h.{b}.out", tape.attention(f"h.{b}.attention", qkv), width))
        hidden = tape.linear(f"h.{b}.up", tape.norm(f"h.{b}.norm2", x), 4 * width)
        x = tape.add(x, tape.linear(f"h.{b}.down", tape.relu_(f"h.{b}.act", hidden), width))
    return tape.finish(tape.linear("head", x, 8 * width))
