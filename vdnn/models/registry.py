"""Models by name: which source a name belongs to, and what names there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from vdnn.checkpointing import checkpoint_blocks
from vdnn.errors import UsageError, unknown_name
from vdnn.models.demo import demo_names, demo_work
from vdnn.models.factory import factory_work
from vdnn.models.hf import hf_names, hf_work
from vdnn.models.options import whole
from vdnn.models.paper import paper_names, paper_work
from vdnn.models.vision import timm_names, timm_work, torchvision_names, torchvision_work
from vdnn.models.work import Work

__all__ = ["checkpointed", "list_models", "load"]

Loader = Callable[[str, int, Mapping[str, object]], Work]

SOURCES: dict[str, tuple[Loader, Callable[[], tuple[str, ...]]]] = {
    "paper": (paper_work, paper_names),
    "torchvision": (torchvision_work, torchvision_names),
    "timm": (timm_work, timm_names),
    "hf": (hf_work, hf_names),
    "demo": (demo_work, demo_names),
}
_HINT = "write SOURCE:NAME, such as torchvision:resnet50, or path/to/file.py:factory"


def load(name: str, batch: int | str = 32, **options: object) -> Work:
    """The work of one training step of a model; nothing is built and nothing is downloaded.

    `name` is `paper:`, `torchvision:`, `timm:`, `hf:` or `demo:` and a model's name, or `path/to/file.py:factory`.
    `batch` and the options, such as `image_size=288` or `sequence=2048`, may be texts from a command line. The option
    `checkpoint` is every model's: "blocks" recomputes the repeated ones in backward, "layers.*,head" those named so.

    Raises:
        UsageError: an unknown source, model or option (with the nearest names), a batch that is not a whole
            number above 0, a package that is not installed, or a file that cannot be loaded.
    """
    number = whole("batch", batch)
    if "checkpoint" in options:
        rest = {key: value for key, value in options.items() if key != "checkpoint"}
        return checkpointed(load(name, number, **rest), str(options["checkpoint"]))
    if not isinstance(name, str) or not name:
        raise UsageError(f"{name!r} is not the name of a model: {_HINT}")
    if name.endswith(".py") or ".py:" in name:
        return factory_work(name, number, options)
    source, colon, model = name.partition(":")
    if not colon:
        homes = [home for home in ("paper", "torchvision", "hf", "timm") if name in _names(home)]
        if homes:
            raise UsageError(f"{name!r} lacks its source: did you mean {' or '.join(f'{h}:{name}' for h in homes)}?")
        raise UsageError(f"{name!r} is not the name of a model: {_HINT}")
    if source not in SOURCES:
        raise unknown_name("source of models", source, SOURCES, _HINT)
    return SOURCES[source][0](model, number, options)


def checkpointed(work: Work, blocks: str = "blocks") -> Work:
    """The same work with its repeated blocks recomputed in backward, or what the names say ("layers.*,head").

    Raises:
        UsageError: no name at all. That a model has no such modules shows when it is built.
    """
    patterns = [] if blocks == "blocks" else [part.strip() for part in blocks.split(",") if part.strip()]
    if not patterns and blocks != "blocks":
        raise UsageError(f"checkpoint is {blocks!r}: write checkpoint=blocks, or names of modules like layers.*")

    def build() -> nn.Module:
        model = work.build()
        checkpoint_blocks(model, patterns)
        return model

    return replace(work, build=build, options=tuple(sorted((*work.options, ("checkpoint", blocks)))))


def _names(source: str) -> tuple[str, ...]:
    try:
        return SOURCES[source][1]()
    except UsageError:  # the package is not installed
        return ()


def list_models() -> dict[str, tuple[str, ...]]:
    """Names by source, without the source's prefix; none for a source whose package is not installed."""
    return {source: _names(source) for source in SOURCES}
