"""Names, batches and options that cannot be used are refused in one sentence with the way out."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdnn.errors import UsageError
from vdnn.models import list_models, load


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvison:resnet50", r"unknown source of models 'torchvison': did you mean torchvision\?"),
        ("torchvision:resnet51", r"unknown torchvision model 'resnet51': did you mean .*resnet50"),
        ("timm:convnext_atom", r"unknown timm model 'convnext_atom': did you mean .*convnext_atto"),
        ("hf:gpt3", r"unknown hf model 'gpt3': did you mean gpt2.*only these configurations come with vdnn"),
        ("paper:vgg19", r"unknown network of the paper 'vgg19': did you mean"),
        ("demo:rnn", r"unknown demonstration network 'rnn': (did you mean|known are) cnn"),
        ("resnet50", r"'resnet50' lacks its source: did you mean torchvision:resnet50 or timm:resnet50\?"),
        ("gpt2", r"'gpt2' lacks its source: did you mean hf:gpt2\?"),
        ("my_model", r"'my_model' is not the name of a model: write SOURCE:NAME"),
        ("", r"is not the name of a model"),
        ("torchvision:", r"unknown torchvision model ''"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(name, batch=1)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (0, "batch=0 is too small: it must be at least 1"),
        (-4, "batch=-4 is too small"),
        ("0", "batch=0 is too small"),
        ("many", "batch=many is not a whole number: write it like batch=32"),
        ("1.5", "batch=1.5 is not a whole number"),
        (1.5, "batch=1.5 is not a whole number"),
        (True, "batch=True is not a whole number"),
        (None, "batch=None is not a whole number"),
    ],
)
def test_a_batch_is_a_whole_number_above_zero(batch: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load("demo:cnn", batch=batch)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("demo:cnn", {"image_sise": 32}, "unknown option of demo:cnn 'image_sise': did you mean image_size"),
        ("hf:gpt2", {"image_size": 32}, "unknown option of hf:gpt2 'image_size'"),
        ("hf:mamba-130m", {"attention": "sdpa"}, "unknown option of hf:mamba-130m 'attention'"),
        ("hf:gpt2", {"attention": "flash"}, "unknown value of attention 'flash': known are eager, sdpa"),
        ("hf:gpt2", {"layers": 0}, "layers=0 is too small"),
        ("torchvision:resnet18", {"image_size": "large"}, "image_size=large is not a whole number"),
        ("paper:vgg16", {"width": "-1"}, "width=-1 is not a number above 0: write it like width=0.25"),
        ("paper:vgg16", {"width": "nan"}, "width=nan is not a number above 0"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(name, batch=1, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("paper:vgg16", {"image_size": 8}, "paper:vgg16: images of 8 × 8 vanish on the way: use a larger image_size"),
        ("torchvision:vit_b_16", {"image_size": 100}, "cannot be built with image_size=100: Input shape indivisible"),
        ("demo:transformer", {"hidden": 100}, "hidden=100: hidden must be a multiple of the head size 32"),
        ("hf:gpt2", {"hidden": 200, "vocabulary": 9}, "hf:gpt2 cannot be built with hidden=200"),
    ],
)
def test_options_that_the_model_refuses_are_explained_when_it_is_built(
    name: str, options: dict[str, Any], message: str
) -> None:
    work = load(name, batch=1, **options)
    with pytest.raises(UsageError, match=message):
        work.build()


def test_options_may_be_texts_and_are_part_of_the_identity() -> None:
    work = load("paper:vgg16", batch="8", image_size="64", width="0.5")
    assert work.batch == 8
    assert work.options == (("image_size", "64"), ("width", "0.5"))
    assert str(work) == "paper:vgg16 batch=8 image_size=64 width=0.5"
    assert load("paper:vgg16", batch=8, width=0.5, image_size=64).options == work.options
    assert load("paper:vgg16", batch=8).options == ()


@given(st.text(max_size=12))
def test_any_other_text_is_refused_without_a_crash(name: str) -> None:
    with pytest.raises(UsageError):
        load(f"demo:{name}?", batch=1)
    with pytest.raises(UsageError):
        load(f"?{name}", batch=1)


@pytest.mark.parametrize(("name", "package"), [("torchvision:resnet18", "torchvision"), ("timm:resnet18", "timm")])
def test_a_package_that_is_missing_is_named_with_its_installation(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    from vdnn.models import vision

    whole_import = builtins.__import__

    def without(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.partition(".")[0] == package:
            raise ImportError(f"No module named {module!r}")
        return whole_import(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    caches = (vision.torchvision_names, vision.timm_names)
    for cache in caches:
        cache.cache_clear()
    try:
        with pytest.raises(UsageError, match=rf"{package} is not installed: pip install 'vdnn\[models\]'"):
            load(name, batch=1)
        assert list_models()[package] == ()
    finally:
        for cache in caches:
            cache.cache_clear()


def test_models_are_listed_by_source() -> None:
    models = list_models()
    assert list(models) == ["paper", "torchvision", "timm", "hf", "demo"]
    assert "resnet50" in models["torchvision"]
    assert "fasterrcnn_resnet50_fpn" not in models["torchvision"]
    assert {"gpt2-xl", "llama-8b", "mixtral-small"} <= set(models["hf"])
    assert set(models["paper"]) == {
        *("alexnet", "googlenet", "overfeat", "vgg16", "vgg116", "vgg216", "vgg316", "vgg416"),
    }
