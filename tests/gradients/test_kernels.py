"""Kernels for GPUs on a CPU: the files beside this one that are named interpreted_*.py, in Triton's interpreter.

They run in a process of their own, one for all: Triton decides once, when it is imported, whether it interprets, and
here transformers may have imported it before. In that process `kernels.usable` takes tensors on a CPU, in no other.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install triton, on Linux")
def test_kernels_do_on_a_cpu_what_their_counterparts_in_plain_torch_do() -> None:
    files = sorted(map(str, HERE.glob("interpreted_*.py")))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", *files],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert re.search(r"\[100%\]|\d+ passed", child.stdout), child.stdout
    assert "skipped" not in child.stdout
    assert len(files) == 3
