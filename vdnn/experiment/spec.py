"""The file of an experiment: sections of models × batches × GPUs × precisions × policies, and figures.

title = "…"
text = "…"

[[simulate]]                       # or [[run]]: real steps, with a prediction beside
title = "VGG-16 as in the paper"
models = ["paper:vgg16"]
batches = [64, 128, 256]
gpus = ["titan-x"]
policies = ["none", "vdnn-all"]    # "none" is always there: it is the baseline
precisions = ["fp32"]
optimizer = "sgd"
rules = "paper"                    # further options of the policy: min_bytes = 65536
options = { image_size = 224 }     # of the models

[[figure]]
kind = "memory"                    # policies, memory, streams, layers, prediction
file = "vgg16-memory.png"
caption = "…"
select = { model = "paper:vgg16", batch = 256, policy = "vdnn-all" }
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from vdnn.errors import FormatError, UsageError, unknown_name
from vdnn.experiment.cpu import CPU_KEYS, Cpu, read_cpu
from vdnn.experiment.frontier import FRONTIER, Frontier, read_frontier
from vdnn.experiment.study import STUDY, Model, Study, made_of
from vdnn.policies import Options, find, must_run
from vdnn.reporting import result_row
from vdnn.units import parse_size
from vdnn.values import Node, RunResult, hardware

__all__ = ["FIGURES", "Case", "Experiment", "Figure", "NodeSweep", "Section", "read_experiment"]

FIGURES = ("policies", "memory", "streams", "layers", "prediction")
# Kinds that show one run alone.
SINGLE = ("memory", "streams", "layers")
POLICY_OPTIONS = tuple(Options.__slots__)


@dataclass(frozen=True, slots=True)
class Case:
    """One run: everything that decides its numbers."""

    kind: Literal["simulate", "run"]
    model: str
    batch: int
    gpu: str
    precision: str
    policy: str
    optimizer: str
    options: tuple[tuple[str, Any], ...]
    policy_options: tuple[tuple[str, Any], ...]
    steps: int
    device: str
    seed: int

    @property
    def slug(self) -> str:
        """A file name for people, made unique by a digest of everything."""
        digest = hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest()[:6]
        model = "".join(c if c.isalnum() or c == "." else "-" for c in Path(self.model).name)
        return f"{model}-{self.batch}-{self.gpu}-{self.precision}-{self.policy}-{digest}"

    def step(self) -> tuple[Any, ...]:
        """What decides the training step itself: cases that share it share a capture."""
        return (self.kind, self.model, self.batch, self.precision, self.optimizer, self.options, self.device)


@dataclass(frozen=True, slots=True)
class Section:
    """Cases under one heading."""

    title: str
    text: str
    cases: tuple[Case, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of the results that `select` names."""

    kind: str
    file: str
    caption: str
    select: tuple[tuple[str, Any], ...]

    def shows(self, result: RunResult) -> bool:
        """Whether a result is one of those selected."""
        row = result_row(result)
        return all(row[name] == wanted for name, wanted in self.select)

    def shows_case(self, case: Case) -> bool:
        """The same of a case that has not run."""
        return all(getattr(case, name, wanted) == wanted for name, wanted in self.select)


@dataclass(frozen=True, slots=True)
class Sweep(Study):
    """Slowdown against the link's bandwidth: one row a model, a panel a GPU; options of a model by its name."""

    precisions: tuple[str, ...]
    policy: str
    links: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class NodeSweep(Study):
    """Slowdown against the number of GPUs on one link, in a node of `ranks` GPUs: a line a policy, a panel a model."""

    precision: str
    policies: tuple[str, ...]
    ranks: int
    per_link: tuple[int, ...]
    host_memory: str

    def node(self, gpus_per_link: int) -> Node:
        """The node with so many GPUs on a link."""
        return Node(self.ranks, gpus_per_link, parse_size(self.host_memory))


@dataclass(frozen=True, slots=True)
class Experiment:
    """A file that was read: `name` is the file's without its ending.

    `networks` are those of the vDNN paper whose figures are reproduced.
    """

    name: str
    file: str
    title: str
    text: str
    sections: tuple[Section, ...]
    figures: tuple[Figure, ...]
    networks: tuple[str, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    nodes: tuple[NodeSweep, ...] = ()
    cpu: Cpu | None = None
    frontiers: tuple[Frontier, ...] = ()
    fidelity: bool = False  # predictions beside published measurements

    @property
    def cases(self) -> tuple[Case, ...]:
        """Every case, in the order of the file."""
        return tuple(case for section in self.sections for case in section.cases)


_SECTION: dict[str, tuple[Any, Any]] = {  # key: type, default (... where there is none)
    "title": (str, ...),
    "text": (str, ""),
    "models": (list, ...),
    "batches": (list, ...),
    "gpus": (list, ...),
    "policies": (list, ...),
    "precisions": (list, ["fp32"]),
    "optimizer": (str, "sgd"),
    "options": (dict, {}),
}
_RUN: dict[str, tuple[Any, Any]] = {"steps": (int, 5), "device": (str, "auto"), "seed": (int, 0)}
_FIGURE = {"kind": (str, ...), "file": (str, ...), "caption": (str, ""), "select": (dict, {})}
_FILE: dict[str, tuple[Any, Any]] = {
    "title": (str, ...),
    "text": (str, ""),
    "simulate": (list, []),
    "run": (list, []),
    "figure": (list, []),
    "reproduction": (dict, {}),
    "fidelity": (dict, {}),
    "bandwidth": (list, []),
    "cpu": (dict, {}),
    "node": (list, []),
    "frontier": (list, []),
}
_SWEEP: dict[str, tuple[Any, Any]] = {
    **STUDY,
    "precisions": (list, ["fp32"]),
    "policy": (str, "vdnn-all"),
    "links": (list, ...),
}
_NODE: dict[str, tuple[Any, Any]] = {
    **STUDY,
    "precision": (str, "amp"),
    "policies": (list, ...),
    "optimizer": (str, "sgd"),
    "ranks": (int, 8),
    "per_link": (list, [1, 2, 4, 8]),
    "host_memory": (str, ...),
}
_SELECT = ("model", "batch", "gpu", "policy", "precision", "source")


def read_experiment(path: Path) -> Experiment:
    """Read an experiment and check every name in it, before anything runs.

    Raises:
        FormatError: not a TOML file, or a key that is missing, unknown or of another type.
        UsageError: an unknown model, GPU, policy, option or figure.
    """
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not TOML: {error}") from None
    top = _checked(data, _FILE, str(path))
    sections = []
    for kind in ("simulate", "run"):
        for number, table in enumerate(top[kind]):
            sections.append(_section(kind, table, f"{path}, [[{kind}]] {number + 1}"))
    networks = _networks(top["reproduction"], f"{path}, [reproduction]") if "reproduction" in data else ()
    sweeps = tuple(_sweep(table, f"{path}, [[bandwidth]] {n + 1}") for n, table in enumerate(top["bandwidth"]))
    nodes = tuple(_node_sweep(table, f"{path}, [[node]] {n + 1}") for n, table in enumerate(top["node"]))
    where = f"{path}, [cpu]"
    cpu = read_cpu(_checked(top["cpu"], CPU_KEYS, where), where, _check_step) if "cpu" in data else None
    frontiers = []
    for number, table in enumerate(top["frontier"]):
        where = f"{path}, [[frontier]] {number + 1}"
        read = _checked(table, FRONTIER, where)
        frontiers.append(read_frontier(read, _models(read, [read["precision"]], where), where))
    fidelity = "fidelity" in data
    if not (sections or networks or sweeps or nodes or cpu or frontiers or fidelity):
        raise FormatError(f"{path} runs nothing: it needs a [[simulate]], a [[run]], a [reproduction] or a [cpu] table")
    figures = tuple(_figure(table, f"{path}, [[figure]] {n + 1}") for n, table in enumerate(top["figure"]))
    heading = (path.stem, str(path), top["title"], top["text"])
    made = Experiment(*heading, tuple(sections), figures, networks, sweeps, nodes, cpu, tuple(frontiers), fidelity)
    for figure in figures:
        if not any(figure.shows_case(case) for case in made.cases):
            chosen = ", ".join(f"{name}={value}" for name, value in figure.select)
            raise UsageError(f"{path}: figure {figure.file} shows nothing: no run of the file has {chosen}")
    return made


def _checked(table: Any, keys: dict[str, tuple[Any, Any]], where: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise FormatError(f"{where} must be a table")
    for key in table:
        if key not in keys:
            raise unknown_name("key", key, keys, where)
    found = {}
    for key, (kind, default) in keys.items():
        value = table.get(key, default)
        if value is ...:
            raise FormatError(f"{where} has no {key!r}")
        if not isinstance(value, kind) or isinstance(value, bool) or (value == [] and default is ...):
            raise FormatError(f"{where}: {key} is {value!r}, it must be a {kind.__name__} that is not empty")
        found[key] = value
    return found


def _section(kind: Any, table: Any, where: str) -> Section:
    keys = {**_SECTION, **(_RUN if kind == "run" else {})}
    plain = {key: value for key, value in table.items() if key not in POLICY_OPTIONS} if isinstance(table, dict) else {}
    asked = {key: value for key, value in table.items() if key in POLICY_OPTIONS} if isinstance(table, dict) else {}
    read = _checked(plain, keys, where)
    Options(**asked).check()
    policies = list(dict.fromkeys(["none", *read["policies"]]))
    for policy in policies:
        (must_run if kind == "run" else find)(str(policy))
    cases = []
    for model, batch, gpu, precision in product(read["models"], read["batches"], read["gpus"], read["precisions"]):
        hardware(str(gpu))
        _check_step(model, batch, precision, read["optimizer"], read["options"])
        cases += [
            Case(
                kind=kind,
                model=model,
                batch=batch,
                gpu=gpu,
                precision=precision,
                policy=policy,
                optimizer=read["optimizer"],
                options=tuple(sorted(read["options"].items())),
                policy_options=tuple(sorted(asked.items())),
                steps=read.get("steps", 0),
                device=read.get("device", ""),
                seed=read.get("seed", 0),
            )
            for policy in policies
        ]
    return Section(read["title"], read["text"], tuple(cases))


def _check_step(model: Any, batch: Any, precision: Any, optimizer: str, options: dict[str, Any]) -> None:
    from vdnn.models import load
    from vdnn.tracing import OPTIMIZERS, PRECISIONS

    load(str(model), batch, **options)
    for what, name, known in (("precision", precision, PRECISIONS), ("optimizer", optimizer, OPTIMIZERS)):
        if name not in known:
            raise unknown_name(what, str(name), known)


def _figure(table: Any, where: str) -> Figure:
    read = _checked(table, _FIGURE, where)
    if read["kind"] not in FIGURES:
        raise unknown_name("figure", read["kind"], FIGURES, where)
    for name in read["select"]:
        if name not in _SELECT:
            raise unknown_name("selection", name, _SELECT, where)
    if Path(read["file"]).name != read["file"] or not read["file"].endswith((".png", ".svg", ".pdf")):
        raise FormatError(f"{where}: file is {read['file']!r}, it must be a plain name ending in .png, .svg or .pdf")
    if read["kind"] in SINGLE and read["select"].get("policy") is None:
        raise FormatError(f"{where}: a figure of {read['kind']} shows one run: select its policy")
    return Figure(read["kind"], read["file"], read["caption"], tuple(sorted(read["select"].items())))


def _networks(table: Any, where: str) -> tuple[str, ...]:
    from vdnn.reproduction.networks import NETWORKS

    read = _checked(table, {"networks": (list, list(NETWORKS))}, where)
    for name in read["networks"]:
        if name not in NETWORKS:
            raise unknown_name("network of the paper's figures", str(name), NETWORKS, where)
    return tuple(read["networks"])


def _sweep(table: Any, where: str) -> Sweep:
    read = _checked(table, _SWEEP, where)
    find(read["policy"])
    models = _models(read, read["precisions"], where)
    if not all(isinstance(link, int | float) and link > 0 for link in read["links"]):
        raise FormatError(f"{where}: links is {read['links']!r}, it must hold GB/s above 0")
    return made_of(Sweep, read, models)


def _models(read: dict[str, Any], precisions: Sequence[str], where: str) -> tuple[Model, ...]:
    """Models with their batches and options, checked with the GPUs beside them."""
    models = []
    for row in read["models"]:
        if not isinstance(row, dict) or not {"model", "batch"} <= row.keys():
            raise FormatError(f'{where}: a model is written {{ model = "torchvision:resnet50", batch = 64 }}')
        options = {key: value for key, value in row.items() if key not in ("model", "batch")}
        for precision in precisions:
            _check_step(row["model"], row["batch"], precision, read["optimizer"], options)
        models.append((row["model"], row["batch"], tuple(sorted(options.items()))))
    for gpu in read["gpus"]:
        hardware(str(gpu))
    return tuple(models)


def _node_sweep(table: Any, where: str) -> NodeSweep:
    read = _checked(table, _NODE, where)
    for policy in read["policies"]:
        find(str(policy))
    if not all(isinstance(count, int) for count in read["per_link"]):
        raise FormatError(f"{where}: per_link is {read['per_link']!r}, it must hold numbers of GPUs")
    made = made_of(NodeSweep, read, _models(read, [read["precision"]], where))
    for count in made.per_link:
        made.node(count).check()
    return made


def iter_steps(cases: tuple[Case, ...]) -> Iterator[tuple[Case, ...]]:
    """The cases in groups that share a training step, in order."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault(case.step(), []).append(case)
    yield from map(tuple, groups.values())
