"""A factory in a file of the user's own: what it may return, and what is said when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vdnn.errors import UsageError
from vdnn.models import load

FILE = """
import torch
from torch import nn
from shapes import SIZE

def alone(batch):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))

def with_inputs(batch, width: int = 4):
    return nn.Linear(SIZE, int(width)), torch.ones(batch, SIZE)

def with_loss(batch):
    return nn.Linear(SIZE, 4), (torch.ones(batch, SIZE),), lambda output: output.square().mean()

def by_name(batch):
    def inputs(device):
        return {name: torch.ones(batch, SIZE, device=device) for name in ("input1", "input2")}
    return nn.Bilinear(SIZE, SIZE, 2), inputs

def fails(batch):
    return helper(batch)

def helper(batch):
    raise RuntimeError(f"no model for {batch}")

def number(batch):
    return 3

def no_scalar(batch):
    return nn.Linear(SIZE, 4), torch.ones(batch, SIZE), lambda output: output

def nothing():
    return nn.Linear(1, 1)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "shapes.py").write_text("SIZE = 5\n")
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


@pytest.mark.parametrize("function", ["alone", "with_inputs", "with_loss", "by_name"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_factory_returns_a_module_perhaps_inputs_perhaps_a_loss(path: Path, function: str, device: str) -> None:
    work = load(f"{path}:{function}", batch=3)
    with FakeTensorMode(), torch.device(device):
        model = work.build()
        args, kwargs = work.inputs(device)
        loss = work.loss(model(*args, **kwargs), work.targets(device))
    assert model.training
    assert loss.shape == ()
    assert loss.device.type == device
    assert {value.shape[0] for value in (*args, *kwargs.values())} == {3}


def test_a_factory_s_options_are_checked_and_passed_on(path: Path) -> None:
    work = load(f"{path}:with_inputs", batch=2, width="7")
    assert work.build().out_features == 7
    assert work.options == (("width", "7"),)
    with pytest.raises(UsageError, match=r"unknown option of .*with_inputs 'widht': did you mean width"):
        load(f"{path}:with_inputs", batch=2, widht=7)
    with pytest.raises(UsageError, match="has no option 'width': it takes the batch size only"):
        load(f"{path}:alone", batch=2, width=7)


def test_a_real_step_sums_the_output_without_a_loss(path: Path) -> None:
    work = load(f"{path}:with_inputs", batch=2)
    model = work.build()
    (x,), _ = work.inputs("cpu")
    assert torch.equal(work.loss(model(x), None), model(x).sum())


def test_a_factory_that_raises_is_shown_with_its_own_lines_only(path: Path) -> None:
    work = load(f"{path}:fails", batch=9)
    with pytest.raises(UsageError) as caught:
        work.build()
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("mine.py:fails failed: RuntimeError: no model for 9")
    assert [line.split("mine.py:")[1] for line in lines[1:]] == [
        "21 in fails: return helper(batch)",
        '24 in helper: raise RuntimeError(f"no model for {batch}")',
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import torch\nx = 1 / 0\n",
            r"cannot be loaded: ZeroDivisionError: division by zero\n  .*broken\.py:2 in <module>",
        ),
        ("def f(:\n", r"cannot be loaded: .*broken\.py:1: SyntaxError: invalid syntax"),
        ("import no_such_package\n", r"ModuleNotFoundError: No module named 'no_such_package'\n  .*broken\.py:1"),
        ("x = 1\n", r"broken\.py defines no function, so it has no 'f'"),
        ("def g(batch): ...\n", r"unknown function in .*broken\.py 'f': known are g"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(UsageError, match=message):
        load(f"{tmp_path / 'broken.py'}:f", batch=1)


def test_a_missing_file_and_a_missing_function_are_named(tmp_path: Path, path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file .*gone\.py"):
        load(f"{tmp_path}/gone.py:make", batch=1)
    with pytest.raises(UsageError, match=r"does not name a function: write it like .*mine\.py:make_model"):
        load(str(path), batch=1)
    with pytest.raises(UsageError, match=r"unknown function in .*mine\.py 'alon': did you mean alone"):
        load(f"{path}:alon", batch=1)


def test_a_factory_of_the_wrong_form_is_told_the_right_one(path: Path) -> None:
    with pytest.raises(UsageError, match=r"returned \(int\): return a module, \(module, inputs\) or"):
        load(f"{path}:number", batch=1).build()
    with pytest.raises(UsageError, match=r"takes no argument: write it as def nothing\(batch\)"):
        load(f"{path}:nothing", batch=1)
    work = load(f"{path}:no_scalar", batch=2)
    model = work.build()
    with pytest.raises(UsageError, match=r"returned a tensor of shape \(2, 4\): it must be one number"):
        work.loss(model(*work.inputs("cpu")[0]), None)
