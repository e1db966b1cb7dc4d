"""Commands that compute nothing start without torch's compiler; whoever asks for it gets it all the same."""

from __future__ import annotations

import subprocess
import sys

_CAPTURE = """
import sys
from vdnn.cli.starting import without_compiler
without_compiler()
import vdnn
trace = vdnn.capture(vdnn.load("demo:cnn", batch=2), optimizer="sgd")
print("torch._dynamo.eval_frame" in sys.modules, trace.fingerprint())
"""
_THEN_ASK = """
import torch
print(torch._dynamo.is_compiling(), torch._dynamo.__spec__.loader.__class__.__name__)
print(torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)).item())
"""


def _output(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_capture_loads_no_compiler_and_later_use_of_it_gets_the_real_one() -> None:
    import vdnn

    loaded, fingerprint, *later = _output(_CAPTURE + _THEN_ASK)
    assert loaded == "False"
    assert fingerprint == vdnn.capture(vdnn.load("demo:cnn", batch=2), optimizer="sgd").fingerprint()
    assert later == ["False", "SourceFileLoader", "1.0"]
