"""The layers of the package: what may import what, and what must stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "vdnn"
FILES = sorted(path for path in ROOT.rglob("*.py"))

# Top-level module → layer. A new module must be given a layer here.
LAYERS = {
    "errors": 0,
    "units": 0,
    "values": 1,
    "snapshots": 1,
    "analysis": 2,
    "policies": 3,
    "sim": 4,
    "replay": 4,
    "costs": 4,
    "planner": 5,
    "calls": 6,
    "checkpointing": 6,
    "ledger": 6,
    "tracing": 6,
    "models": 6,
    "measuring": 6,
    "tracker": 6,
    "engine": 6,
    "reporting": 7,
    "api": 8,
    "experiment": 8,
    "reproduction": 8,
    "fidelity": 8,
    "training": 8,
    "deciding": 8,
    "trace_cache": 8,
    "advising": 8,
    "batches": 8,
    "choosing": 8,
    "integrations": 8,
    "cli": 8,
    "__init__": 8,
}
# What a layer may import besides itself: a simulator must not know how a plan was made (4 not 3), and what
# runs on a device must not either (6 not 3–5).
MAY_IMPORT = {
    0: set(),
    1: {0},
    2: {0, 1},
    3: {0, 1, 2},
    4: {0, 1, 2},
    5: {0, 1, 2, 3, 4},
    6: {0, 1, 2},
    7: {0, 1, 2},
    8: set(range(8)),
}
PUBLIC_FUNCTIONS = {
    "wrap",
    "unwrap",
    "offload",
    "report",
    "load",
    "capture",
    "plan",
    "simulate",
    "track",
    "run",
    "max_batch",
}
NO_CONCEPT = {"utils", "helpers", "manager", "common"}


def top(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(source: str, module: str, inside_functions: bool) -> set[str]:
    """Dotted names that a file imports; without those inside functions, or only for type checking, if so asked."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")[: -node.level]
                base = ".".join([*parts, base] if base else parts)
            # `from vdnn import sim` imports a module, `from vdnn.sim import run` may
            found.update(f"{base}.{alias.name}" for alias in node.names)
        if not inside_functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def violations(path: Path, source: str) -> list[str]:
    layer = LAYERS[top(path)]
    module = "vdnn." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    bad = []
    for name in sorted(imported(source, module, inside_functions=layer <= 5)):
        head, *rest = name.split(".")
        if head == "vdnn" and rest and rest[0] in LAYERS and LAYERS[rest[0]] not in MAY_IMPORT[layer] | {layer}:
            bad.append(f"layer {layer} imports {name} of layer {LAYERS[rest[0]]}")
        if head in ("torch", "torchvision", "timm", "transformers") and layer not in (6, 8):
            bad.append(f"layer {layer} imports {name}")
        if head == "matplotlib" and layer < 7:
            bad.append(f"layer {layer} imports {name}")
        if head == "scipy" and layer <= 5 and name in imported(source, module, inside_functions=False):
            bad.append(f"{name} at the top: import it inside the function that needs it")
    return bad


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    assert top(path) in LAYERS, f"give {top(path)} a layer"
    assert violations(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("sim/run.py", "from vdnn.policies import decide"),
        ("sim/run.py", "def f():\n    from vdnn import policies"),
        ("engine/storage.py", "from vdnn.sim import simulate_step"),
        ("analysis/liveness.py", "import torch"),
        ("sim/run.py", "from ..policies import decide"),
        ("policies/none.py", "def f():\n    import matplotlib.pyplot"),
        ("costs/times.py", "from scipy import optimize"),
        ("values/plan.py", "from vdnn.analysis.liveness import peak"),
    ],
)
def test_a_forbidden_import_would_be_found(file, line):
    assert violations(ROOT / file, line)


def test_an_allowed_import_is_not_found():
    assert violations(ROOT / "costs/times.py", "def f():\n    from scipy import optimize") == []
    assert violations(ROOT / "cli/main.py", "from vdnn.sim import simulate_step\nimport torch") == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_named_after_what_they_hold(path):
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in NO_CONCEPT


def test_no_submodule_hides_a_public_function():
    assert not PUBLIC_FUNCTIONS & {top(path) for path in FILES}


def heavy_after(statement: str) -> str:
    """Which heavy packages a fresh interpreter has loaded after a statement."""
    watched = ("torch", "matplotlib", "scipy", "numpy")
    code = f"{statement}\nimport sys\nprint(','.join(m for m in {watched} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_analysis_policies_and_simulator_load_nothing_heavy():
    light = (
        "import vdnn.values, vdnn.analysis.moments, vdnn.analysis.liveness, vdnn.analysis.synthetic, "
        "vdnn.policies, vdnn.sim, vdnn.costs"
    )
    assert heavy_after(light) == ""


def test_the_check_for_heavy_packages_can_fail():
    assert "scipy" in heavy_after("import scipy")
    assert "torch" in heavy_after("import vdnn.calls")
