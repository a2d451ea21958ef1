"""Two processes that are given one folder: one works in it, the other is refused, and nothing is of both."""

import dataclasses
import fcntl
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_runs import ROUNDS, in_child, trained

from experiments.compare import Compare
from experiments.sweep.command import Sweep
from experiments.sweep.points import SweepConfig
from fedsim.config import RunConfig
from fedsim.errors import InvalidInput
from fedsim.privacy.ledger import read_entries
from server.results.hold import NAME, Hold
from server.results.run_folder import RunFolder, new_output_folder

SmallRun = Callable[..., RunConfig]


def fields(run: RunConfig) -> dict[str, Any]:
    return {item.name: getattr(run, item.name) for item in dataclasses.fields(RunConfig)}


def both(works: list[Callable[[], Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], str]:
    """Two processes at once, each of which has found the folder free before the other has written there.

    Returns:
        Their exit codes, and how one was refused.
    """
    together = multiprocessing.get_context("fork").Barrier(2)
    look, make = RunFolder.require_unused, RunFolder.make

    def looked_together(folder: RunFolder) -> None:
        look(folder)
        if making:
            making.clear()
            together.wait(60)

    def made(folder: RunFolder) -> None:
        if not held:
            held.append(1)
            making.append(1)
        make(folder)

    making: list[int] = []
    held: list[int] = []  # the first folder that a process makes is the one that both want
    monkeypatch.setattr(RunFolder, "require_unused", looked_together)
    monkeypatch.setattr(RunFolder, "make", made)
    refusal = tmp_path / "refusal.txt"

    def told(work: Callable[[], Any]) -> None:
        try:
            work()
        except InvalidInput as error:
            refusal.write_text(str(error))
            raise

    children = [in_child(partial(told, work), tmp_path / "said.log") for work in works]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes, refusal.read_text() if refusal.exists() else ""


def test_two_runs(small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    first = small_run(output)
    trained(dataclasses.replace(first, output=str(tmp_path / "before")))  # model and store are in the cache
    second = dataclasses.replace(first, plan=dataclasses.replace(first.plan, rounds=4, noise_multiplier=2.0))
    codes, said = both([partial(trained, first), partial(trained, second)], tmp_path, monkeypatch)
    assert sorted(codes) == [0, 1], said
    assert f"output is '{output}'; it must be a folder" in said
    config = json.loads((output / "config.json").read_text())
    noise = config["config"]["plan.noise-multiplier"]
    entries = read_entries(output / "ledger.jsonl")
    assert len(entries) == config["config"]["plan.rounds"] == {1.0: ROUNDS, 2.0: 4}[noise]
    assert all(f"noise_multiplier={noise}" in repr(entry.event) for entry in entries)
    assert json.loads((output / "privacy.json").read_text())["steps"] == len(entries)
    assert not (output / NAME).exists()


def test_names_given_at_once_differ_before_any_folder_is_there() -> None:
    names = [new_output_folder("uls") for _ in range(100)]
    assert len(set(names)) == len(names)


def test_two_comparisons(small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(tmp_path / "both")
    plans = [dataclasses.replace(run.plan, rounds=rounds) for rounds in (2, 3)]
    works = [partial(Compare(**{**fields(run), "plan": plan}).compared, tmp_path / "both") for plan in plans]
    codes, said = both(works, tmp_path, monkeypatch)
    assert sorted(codes) == [0, 1], said
    rounds = json.loads((tmp_path / "both/config.json").read_text())["config"]["plan.rounds"]
    for arm in ("uls", "els"):
        assert len(read_entries(tmp_path / "both" / arm / "ledger.jsonl")) == rounds


def test_two_that_go_on_with_one_run(small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("server.training.Training.run", end)
        with pytest.raises(KeyboardInterrupt):
            trained(small_run(tmp_path / "run"))
    half = tmp_path / "run" / "config.json.partial"
    half.write_text("what the other is just writing")
    with Hold(tmp_path / "run") as hold:
        hold.take("output")
        with pytest.raises(InvalidInput, match=r"resume is .*no other process is at work"):
            trained(small_run(tmp_path / "run", resume=str(tmp_path / "run")))
        assert half.exists()
    assert trained(small_run(tmp_path / "run", resume=str(tmp_path / "run")))["rounds"] == ROUNDS


def test_two_sweeps(small_run: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "sweep/uls-point.partial").mkdir(parents=True)
    sweep = Sweep(**fields(small_run(tmp_path / "sweep")), sweep=SweepConfig(seeds=1))
    with Hold(tmp_path / "sweep") as hold:
        hold.take("output")
        with pytest.raises(InvalidInput, match="no other process is at work"):
            sweep.swept()
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["uls-point.partial"]


def test_a_hold_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    def die() -> None:
        Hold(tmp_path / "run").take("output")
        os.kill(os.getpid(), 9)

    os.waitpid(in_child(die, tmp_path / "log"), 0)
    assert (tmp_path / "run" / NAME).exists()
    with Hold(tmp_path / "run") as hold:
        hold.take("output")
    assert not (tmp_path / "run" / NAME).exists()


def test_a_run_that_ended_between_the_look_and_the_hold_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, look = RunFolder(tmp_path / "run"), RunFolder.require_unused

    def looked_too_early(one: RunFolder) -> None:
        look(one)
        folder.path.mkdir()
        folder.config.write_text("of another run, which has let go of the folder")

    monkeypatch.setattr(RunFolder, "require_unused", looked_too_early)
    with pytest.raises(InvalidInput, match="a folder without a run in it"), folder.undone_unless_kept():
        folder.make()
    assert folder.config.read_text().startswith("of another run")
    assert [path.name for path in folder.path.iterdir()] == [folder.config.name]


@pytest.mark.parametrize("third", [True, False])
def test_a_lock_that_was_removed_as_it_was_opened_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, third: bool
) -> None:
    """Whoever held the folder lets go of it, and perhaps somebody else takes it, between another's two steps."""
    first, others, second = Hold(tmp_path), Hold(tmp_path), Hold(tmp_path)
    first.take("output")
    flock = fcntl.flock

    def locked(descriptor: int, operation: int) -> None:
        if first._descriptor is not None:
            first.let_go()
            if third:
                others.take("output")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", locked)
    with second, others:
        if third:
            with pytest.raises(InvalidInput, match="no other process is at work"):
                second.take("output")
        else:
            second.take("output")
            with pytest.raises(InvalidInput, match="no other process is at work"):
                Hold(tmp_path).take("output")


def test_a_look_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the lock file that a crash left, where a look takes hold of it for a moment."""
    (tmp_path / NAME).touch()
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            with suppress(InvalidInput):
                Hold(tmp_path).require_free("output")
            time.sleep(0.002)

    def locked(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        if operation & fcntl.LOCK_NB and threading.current_thread() is not threading.main_thread():
            time.sleep(0.002)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", locked)
    with Hold(tmp_path) as hold:
        lookers = [threading.Thread(target=look)]
        lookers[0].start()
        try:
            for _ in range(50):
                (tmp_path / NAME).touch()
                hold.take("output")
                with pytest.raises(InvalidInput, match="no other process is at work"):
                    Hold(tmp_path).require_free("output")
                hold.let_go()
        finally:
            ended.set()
            lookers[0].join()
    with Hold(tmp_path) as hold:  # two that look are not in the way of each other
        (tmp_path / NAME).touch()
        with (tmp_path / NAME).open() as file:
            flock(file, fcntl.LOCK_SH)
            Hold(tmp_path).require_free("output")


def test_one_that_goes_on_with_a_run_that_another_just_finished(
    small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = trained(small_run(tmp_path / "run"))
    there = (tmp_path / "run" / "summary.json").read_text()
    entries = read_entries(tmp_path / "run" / "ledger.jsonl")
    (tmp_path / "run" / "summary.json").unlink()
    take = Hold.take

    def taken_late(hold: Hold, field: str) -> None:
        (tmp_path / "run" / "summary.json").write_text(there)
        take(hold, field)

    monkeypatch.setattr(Hold, "take", taken_late)
    monkeypatch.setattr("server.app._train", lambda *arguments: pytest.fail("trains a finished run"))
    assert trained(small_run(tmp_path / "run", resume=str(tmp_path / "run"))) == summary
    assert read_entries(tmp_path / "run" / "ledger.jsonl") == entries
    assert not (tmp_path / "run" / NAME).exists()
