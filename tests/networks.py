"""Small networks for Hypothesis to draw: what makes a training step's saved tensors hard, in a few lines each.

@given(networks())   branches, modules called again, views, in-place changes, both kinds of checkpoint, loops, detach,
                     parts on streams of their own, one or two losses

A network is a program: a tuple of steps over a value of `ROWS` × `WIDTH`. The same program runs on any device; the
streams are told to it (`Streams`), so without a device it is a plain model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["FEATURES", "Network", "Program", "Streams", "networks"]

ROWS, WIDTH = 4, 8
MODULES = 3  # that may be called any number of times each

Step = tuple[Any, ...]

# None of them grows for long: where a number is not finite, a wrong one could hide.
_PLAIN = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "softmax": lambda x: torch.softmax(x, 1),
    "relu_": lambda x: (x * 1.5).relu_(),
    "tanh_": lambda x: (x + 0.5).tanh_(),
    "mul_": lambda x: (x * 0.9).mul_(0.5),
    "chunk": lambda x: torch.cat([half.sin() for half in x.chunk(2, 1)[::-1]], 1),
    "gram": lambda x: (x @ x.t() @ x).tanh(),
    "rows": lambda x: torch.cat([(x[1:] * x[:-1]).tanh(), x[:1].sin()], 0),
    "strided": lambda x: x.as_strided((WIDTH, ROWS), (1, WIDTH)).sigmoid().reshape(WIDTH, ROWS).t() * x,
    "expand": lambda x: x * x.mean(1, keepdim=True).tanh().expand(ROWS, WIDTH).exp(),
}
FEATURES = ("branch", "module called again", "view", "in-place", "checkpoint", "reentrant checkpoint", "loop")
FEATURES += ("detach", "two losses", "streams")


@dataclass(frozen=True)
class Program:
    """What a network does. `backward`: of the `sum` of both losses, or of each in turn (`each`, `each reversed`)."""

    steps: tuple[Step, ...]
    second_loss: int | None
    backward: str
    backward_stream: int

    def features(self) -> set[str]:
        """Which of `FEATURES` it has."""
        found = {"two losses"} if self.second_loss is not None else set()
        names, called = [], []
        todo = [*self.steps]
        while todo:
            step = todo.pop()
            names.append(step[0] if step[0] != "plain" else step[1])
            if step[0] == "module":
                called.append(step[1])
            if step[0] in ("loop", "checkpoint", "stream"):
                todo += step[2]
            if step[0] == "checkpoint" and step[1]:
                names.append("reentrant checkpoint")
        kinds = {"add": "branch", "mul": "branch", "stream": "streams", "chunk": "view", "gram": "view", "rows": "view"}
        kinds |= {"strided": "view", "expand": "view", "relu_": "in-place", "tanh_": "in-place", "mul_": "in-place"}
        found |= {kinds.get(name, name) for name in names} & set(FEATURES)
        if len(set(called)) < len(called):
            found.add("module called again")
        if self.backward_stream:
            found.add("streams")
        return found


class Streams:
    """Streams of a device for parts of a network; without a device, none."""

    def __init__(self, device: Any = None, streams: tuple[Any, ...] = ()) -> None:
        self._device = device
        self._streams = streams
        self._inside: list[contextlib.ExitStack] = []

    def enter(self, number: int) -> None:
        """Go on on another stream, behind what this one was given."""
        stack = contextlib.ExitStack()
        self._inside.append(stack)
        if self._device is not None:
            before, stream = self._device.current_stream(), self._streams[number]
            self._device.wait(stream, self._device.record(before))
            stack.callback(lambda: self._device.wait(before, self._device.record(stream)))
            stack.enter_context(self._device.stream(stream))

    def leave(self) -> None:
        """Go back to the stream before, behind what the other one was given."""
        self._inside.pop().close()

    @contextlib.contextmanager
    def on(self, number: int) -> Iterator[None]:
        """A block on another stream; 0 is the one that it is on."""
        if not number:
            yield
            return
        self.enter(number - 1)
        try:
            yield
        finally:
            self.leave()


class _Border(torch.autograd.Function):
    """Where a part on another stream begins or ends: backward changes streams there, as autograd does on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, streams: Streams, into: int) -> torch.Tensor:
        ctx.streams, ctx.into = streams, into
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.into < 0:
            ctx.streams.leave()
        else:
            ctx.streams.enter(ctx.into)
        return grad, None, None


class Network(nn.Module):
    """A program with its weights. Returns one loss or two."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.streams = Streams()
        self.parts = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)])
        self.norm = nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [self.parts[0](x)]
        y = self._run(self.program.steps, values[0], values)
        losses = [y.square().sum()]
        if self.program.second_loss is not None:
            losses.append((values[self.program.second_loss % len(values)] * y.detach()).tanh().sum())
        return tuple(losses)

    def _run(self, steps: tuple[Step, ...], x: torch.Tensor, values: list[torch.Tensor]) -> torch.Tensor:
        """The steps in turn. Each outcome is put with the values that later steps may take up again."""
        for step in steps:
            x = self._step(step, x, values)
            values.append(x)
        return x

    def _step(self, step: Step, x: torch.Tensor, values: list[torch.Tensor]) -> torch.Tensor:
        match step:
            case ("plain", name):
                return _PLAIN[name](x)
            case ("module", number):
                return self.parts[number](x)
            case ("norm",):
                return self.norm(x)
            case ("dropout",):
                return self.drop(x)
            case ("add", back):
                return x + values[-1 - back % len(values)].sigmoid()
            case ("mul", back):
                return (x * values[-1 - back % len(values)]).tanh()
            case ("detach", back):
                return (x * values[-1 - back % len(values)].detach()).tanh()
            case ("loop", times, inner):
                for _ in range(times):
                    x = self._run(inner, x, [x])
                return x
            case ("checkpoint", reentrant, inner):
                return checkpoint(lambda y: self._run(inner, y, [y]), x, use_reentrant=reentrant)
            case ("stream", number, inner):
                with self.streams.on(number):
                    y = self._run(inner, _Border.apply(x, self.streams, -1), [x])
                return _Border.apply(y, self.streams, number - 1)
        raise ValueError(f"no such step: {step}")

    def backward(self, losses: tuple[torch.Tensor, ...]) -> None:
        """As the program has it."""
        with self.streams.on(self.program.backward_stream):
            if self.program.backward == "sum" or len(losses) == 1:
                sum(losses).backward()  # type: ignore[union-attr]
                return
            ordered = losses if self.program.backward == "each" else losses[::-1]
            for number, loss in enumerate(ordered):
                loss.backward(retain_graph=number + 1 < len(ordered))


_SIMPLE = st.one_of(
    st.sampled_from(sorted(_PLAIN)).map(lambda name: ("plain", name)),
    st.sampled_from(sorted(_PLAIN)).map(lambda name: ("plain", name)),
    st.integers(0, MODULES - 1).map(lambda number: ("module", number)),
    st.just(("norm",)),
    st.just(("dropout",)),
    st.integers(0, 4).map(lambda back: ("add", back)),
    st.integers(0, 4).map(lambda back: ("mul", back)),
    st.integers(0, 4).map(lambda back: ("detach", back)),
)


def _steps(depth: int, least: int = 1) -> st.SearchStrategy[tuple[Step, ...]]:
    step = _SIMPLE
    if depth:
        inner = _steps(depth - 1)
        step = st.one_of(
            _SIMPLE,
            st.tuples(st.just("loop"), st.integers(2, 3), inner),
            st.tuples(st.just("checkpoint"), st.booleans(), inner),
            st.tuples(st.just("stream"), st.integers(1, 2), inner),
        )
    return st.lists(step, min_size=least, max_size=least + 2).map(tuple)


@st.composite
def networks(draw: st.DrawFn) -> Program:
    """Any program."""
    return Program(
        steps=draw(_steps(2, least=4)),
        second_loss=draw(st.none() | st.integers(0, 6)),
        backward=draw(st.sampled_from(["sum", "each", "each reversed"])),
        backward_stream=draw(st.integers(0, 1)),
    )
