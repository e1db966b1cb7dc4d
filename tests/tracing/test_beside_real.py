"""A capture on the CPU beside the real thing: packs as in a real run, backward ops as the real engine issues them."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vdnn.models
from vdnn.tracing import capture_work
from vdnn.tracing.stage import outside_the_engine
from vdnn.tracing.walk import Backward

SMALL = {"layers": 2, "hidden": 128, "vocabulary": 100}
QUICK = [
    ("torchvision:resnet18", {"image_size": 64}),
    ("torchvision:squeezenet1_1", {"image_size": 64}),
    ("torchvision:mobilenet_v3_small", {"image_size": 64}),
    ("demo:cnn", {}),
    ("demo:transformer", {}),
    ("hf:gpt2", {**SMALL, "sequence": 24}),
    ("hf:llama-1b", {**SMALL, "sequence": 24}),
]
LONG = [
    (f"torchvision:{name}", {"image_size": size})
    for name, size in [
        ("alexnet", 64), ("densenet121", 64), ("efficientnet_b0", 64), ("googlenet", 96), ("inception_v3", 299),
        ("mnasnet0_5", 64), ("mobilenet_v2", 64), ("regnet_x_400mf", 64), ("regnet_y_400mf", 64), ("resnet50", 64),
        ("resnext50_32x4d", 64), ("shufflenet_v2_x0_5", 64), ("squeezenet1_0", 64), ("swin_t", 64), ("vgg11", 64),
        ("vgg11_bn", 64), ("vit_b_16", 64), ("wide_resnet50_2", 64), ("convnext_tiny", 64), ("resnet34", 64),
        ("densenet161", 64), ("efficientnet_v2_s", 64), ("maxvit_t", 224), ("swin_v2_t", 64),
        ("shufflenet_v2_x1_0", 64), ("mobilenet_v3_large", 64), ("vgg16", 64),
    ]
]  # fmt: skip
LONG += [
    ("hf:bert-base", {**SMALL, "sequence": 24}),
    ("hf:t5-small", {**SMALL, "sequence": 24}),
    ("hf:vit-base", {"layers": 2, "hidden": 128, "image_size": 32}),
    ("hf:vit-base", {"layers": 2, "hidden": 128, "image_size": 32, "attention": "eager"}),
    ("hf:mamba-130m", {**SMALL, "sequence": 12}),
    ("hf:mixtral-small", {**SMALL, "sequence": 24}),
    ("hf:gpt2", {**SMALL, "sequence": 24, "attention": "eager"}),
    ("hf:llama-8b", {**SMALL, "sequence": 24, "attention": "eager"}),
]
MODELS = [pytest.param(*m, id=m[0]) for m in QUICK] + [pytest.param(*m, id=m[0], marks=pytest.mark.slow) for m in LONG]


def _strided(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A dimension of size 1 is never stepped over: kernels and their rules for fakes write any stride there."""
    return tuple(shape), tuple(step if size > 1 else 0 for size, step in zip(shape, stride, strict=True))


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_packs_on_the_cpu_equal_those_of_a_real_run(name: str, options: dict[str, object]) -> None:
    work = vdnn.models.load(name, batch=2, **options)
    trace = capture_work(work, device="cpu")
    seen: list[tuple[object, ...]] = []
    storages: dict[int, int] = {}
    keep = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        keep.append(t)  # so that no address is used twice
        number = storages.setdefault(t.untyped_storage()._cdata, len(storages))
        dtype = str(t.dtype).removeprefix("torch.")
        seen.append((number, dtype, *_strided(t.shape, t.stride()), t.storage_offset(), t.untyped_storage().nbytes()))
        return t

    torch.manual_seed(0)
    model = work.build()
    args, kwargs = work.inputs("cpu")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        work.loss(model(*args, **kwargs), work.targets("cpu"))
    numbers: dict[int, int] = {}
    captured = [
        (
            numbers.setdefault(t.storage, len(numbers)),
            t.dtype,
            *_strided(t.shape, t.stride),
            t.offset,
            trace.storages[t.storage].nbytes,
        )
        for t in trace.saved
    ]
    assert captured == seen


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "prim" and "detach" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_the_walk_runs_the_ops_of_the_real_engine_in_its_order(name: str, options: dict[str, object]) -> None:
    work = vdnn.models.load(name, batch=2, **options)
    trace = capture_work(work, device="cpu")
    ours = [op.name for op in trace.ops if op.phase == "backward" and "detach" not in op.name]
    with FakeTensorMode():
        model = work.build()
        args, kwargs = work.inputs("cpu")
        with outside_the_engine():  # transformers takes fakes for packed sequences
            loss = work.loss(model(*args, **kwargs), work.targets("cpu"))
        with Names() as engine:
            loss.backward()
    assert ours == engine.names  # under a dispatch mode the engine adds no gradient in place


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_gradients_of_branches_are_added_in_place_where_the_real_engine_does_it(
    name: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a capture for CUDA has them; on a virtual device a dispatch mode counts, so that one has none."""
    monkeypatch.setattr("vdnn.tracing.watch.Backward", lambda *hooks: Backward(*hooks[:-1], in_place=True))
    work = vdnn.models.load(name, batch=2, **options)
    trace = capture_work(work, device="cpu")
    ours = [op.name for op in trace.ops if op.phase == "backward" and op.name.startswith(("aten.add.", "aten.add_."))]
    torch.manual_seed(0)
    model = work.build()
    args, kwargs = work.inputs("cpu")
    loss = work.loss(model(*args, **kwargs), work.targets("cpu"))
    with torch.autograd.profiler.profile() as watched:
        loss.backward()
    events = sorted(watched.function_events, key=lambda event: event.time_range.start)
    real = [event.name for event in events if event.name in ("aten::add", "aten::add_")]
    assert [name.rsplit(".", 1)[0].replace(".", "::") for name in ours] == real
