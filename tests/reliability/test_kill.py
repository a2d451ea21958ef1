"""Killed anywhere, resumed each time: nothing is lost, and ε counts everything that was released."""

import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from small_runs import ROUNDS, in_child, trained

from fedsim.config import OptimizerConfig, RunConfig
from fedsim.plan import plan_from_json
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.ledger import MODEL_UPDATE, merged, read_entries

KILLS = int(os.environ.get("FEDSIM_KILLS", "5"))
"""How often to kill; 20 and more when the code that it tests has changed."""
ALONE = "FEDSIM_KILL_TEST_ALONE"
BANDS = ("1", "3")
WATCHED = (f"{os.sep}server{os.sep}", f"{os.sep}release{os.sep}", f"{os.sep}ledger.py")
"""Every line of these is a moment at which the process may die, the checkpoint's own thread included."""


class DieAtLine:
    """Kills the process, as SIGKILL does, at the nth line that it executes in the watched files."""

    def __init__(self, nth: int | None, count: Path | None = None) -> None:
        self.nth, self.count, self.lines = nth, count, 0

    def __enter__(self) -> None:
        threading.settrace(self._calls)
        sys.settrace(self._calls)

    def __exit__(self, *exception: Any) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        if self.count is not None:
            self.count.write_text(str(self.lines))

    def _calls(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        return self._line if any(part in name for part in WATCHED) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.nth:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._line


def begin_or_resume(config: RunConfig, at_line: DieAtLine) -> None:
    folder = Path(str(config.output))
    if (folder / "config.json").exists():
        config = dataclasses.replace(config, resume=str(folder))
    with at_line:
        trained(config)


def check_finished(folder: Path, whole: Path) -> int:
    """A run that was killed ends as the one that was not; returns how many rounds were charged again."""
    assert (folder / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    measured = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], line.get("loss")) for line in measured] == [
        (line["round"], line.get("loss")) for line in expected
    ]

    entries = [entry for entry in read_entries(folder / "ledger.jsonl") if entry.purpose == MODEL_UPDATE]
    assert {entry.round for entry in entries} == set(range(ROUNDS))
    plan = plan_from_json(json.dumps(json.loads((folder / "config.json").read_text())["identity"]["plan"]))
    statement = json.loads((folder / "privacy.json").read_text())
    assert statement["steps"] == len(entries)
    assert statement["epsilon"]["upper"] == plan.epsilon(len(entries)).upper
    # The ledger alone gives the statement's ε again.
    again = epsilon_bounds(merged(entry.event for entry in entries), plan.delta, adjacency=plan.adjacency)
    assert again.upper == statement["epsilon"]["upper"]
    left = {path.name for path in folder.iterdir()}
    assert left == {path.name for path in whole.iterdir()}
    assert "secret.json" not in left
    return len(entries) - ROUNDS


def test_runs_killed_at_random_moments_end_as_if_they_had_not_been() -> None:
    # A forked child must not inherit the threads of OpenMP or of other tests' Ray: runs are forked from an interpreter
    # of their own, with one thread.
    name = f"{__file__}::{killed_at_random_moments.__name__}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", name],
        env={**os.environ, ALONE: "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if "rounds charged again" in line]
    assert len(told) == len(BANDS)
    print(*told, sep="\n")


@pytest.mark.parametrize("bands", BANDS)
def killed_at_random_moments(small_run, tmp_path: Path, bands: str) -> None:
    # The average has a part of every round's weights, so that what is exported shows a difference in any.
    plan = dataclasses.replace(small_run("").plan, bands=bands)
    small_run = functools.partial(small_run, plan=plan, optimizer=OptimizerConfig(average="exponential"))
    whole, log, lines = tmp_path / "whole", tmp_path / "log", tmp_path / "lines"
    trained(small_run(tmp_path / "warm"))  # so that forked children begin with everything imported and cached
    began = time.monotonic()
    child = in_child(lambda: begin_or_resume(small_run(whole), DieAtLine(None, lines)), log)
    assert os.waitpid(child, 0)[1] == 0, log.read_text()
    seconds = time.monotonic() - began
    total = int(lines.read_text())

    generator = random.Random(int(os.environ.get("FEDSIM_KILL_SEED", "0")))
    kills, finished, charged_again = 0, 0, 0
    folder = tmp_path / "run-0"
    while kills < KILLS:
        # Half of the kills come by the clock and half by the line, which finds the instants that are short.
        by_line = generator.random() < 0.5
        die = DieAtLine(generator.randrange(1, total) if by_line else None)
        child = in_child(functools.partial(begin_or_resume, small_run(folder), die), log)
        if not by_line:
            time.sleep(generator.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            kills += 1
            continue
        assert status == 0, log.read_text()
        charged_again += check_finished(folder, whole)
        finished += 1
        folder = tmp_path / f"run-{finished}"
    child = in_child(lambda: begin_or_resume(small_run(folder), DieAtLine(None)), log)
    assert os.waitpid(child, 0)[1] == 0, log.read_text()
    charged_again += check_finished(folder, whole)
    print(f"\n{kills} kills, {finished + 1} runs finished, {charged_again} rounds charged again")
    if bands != "1":
        assert charged_again == 0  # a round that was released is repeated, one that was not uses its charge
    assert charged_again <= 2 * kills  # at most the rounds since the last checkpoint, and it is written every other


killed_at_random_moments.__test__ = ALONE in os.environ  # type: ignore[attr-defined]  # a test there alone
