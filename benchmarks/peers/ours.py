"""fedsim's own rows: its command line, in a process of its own, as a user would call it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers import clock
from benchmarks.peers.sides.side import Task, versions
from benchmarks.peers.task import Corpus
from fedsim.errors import Failure


def command(run: Path, corpus: Corpus, task: Task, more: tuple[str, ...]) -> list[str]:
    """Arguments of the command that trains into a folder. Held-out users are looked at as little as can be: losses
    are measured afterwards, as for all."""
    options = {
        "plan.epsilon": task.epsilon,
        "plan.delta": task.delta,
        "plan.rounds": task.steps,
        "plan.gradients-per-round": task.gradients,
        "plan.group-size": task.group_size,
        "plan.clip-norm": task.clip_norm,
        "optimizer.name": "adam",
        "optimizer.learning-rate": task.learning_rate,
        "engine.kind": "local",
        "evaluation.every": task.steps,
        "evaluation.max-rows": 1,
        "evaluation.test-rows": 1,
        "sampling-seed": task.seed,
        "noise-seed": task.seed + 1,
        "callbacks": f"{clock.__name__}:{clock.Clock.__name__}",
        "output": run,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return ["train", *corpus.options(), *flags, *more]


def train(folder: Path, corpus: Corpus, task: Task, more: tuple[str, ...]) -> dict[str, Any]:
    """Train, have `account --check` confirm the statement by a second method, and report as the others' programs do.

    Raises:
        Failure: Where either of them ends with an error.
    """
    run, times = folder / "run", folder / "clock.jsonl"
    _call(command(run, corpus, task, more), times)
    _call(["account", "--check", str(run)], times)
    summary = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][-1]
    statement = json.loads((run / "privacy.json").read_text(encoding="utf-8"))
    return {
        **clock.elapsed(times),
        "gradients": summary["gradient_evaluations"],
        "stated_epsilon": statement["epsilon"]["upper"],
        "mechanism": {"kind": "ledger", "event": statement["event"]},
        "versions": versions("fedsim", "flwr"),
    }


def _call(arguments: list[str], times: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", clock.FILE: str(times)},
    )
    if done.returncode:
        raise Failure(f"fedsim {arguments[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
