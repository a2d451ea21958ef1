"""pfl-research in an environment of its own, made on first use (it needs an older dp-accounting than fedsim)."""

import json
import os
import subprocess
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.engine.small_task import Task
from benchmarks.environments import environment
from fedsim.errors import Failure

PFL = "pfl[pytorch]==0.6.0"
SCRIPT = Path(__file__).with_name("pfl_rounds.py")


def rounds(cache: Path, task: Task, count: int, processes: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rounds with so many processes of one thread: each one's seconds and the first process's processor seconds,
    [count, 2], and the parameters after one noiseless round."""
    torch = version("torch").split("+")[0]  # the same as here
    python = environment(cache / "pfl-env", [PFL, f"torch=={torch}"])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rounds.npz"
        launcher = [str(python)]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [*launcher, str(SCRIPT), str(count), "1", json.dumps(asdict(task)), str(output)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise Failure(f"pfl-research ended with {done.returncode}: {done.stderr[-2000:]}")
        found = dict(np.load(output))
    return found.pop("seconds"), found
