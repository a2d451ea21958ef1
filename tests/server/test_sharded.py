"""Rounds over Ray actors that form the sums themselves: today's bits, also where workers are killed."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known_worker import SIZE, Known, known_app

from clients.answers import app_of
from fedsim.config import OptimizerConfig
from fedsim.engine.local import LocalGrid
from fedsim.engine.ray_grid import RayGrid
from fedsim.optimizer import ServerOptimizer
from fedsim.plan import UlsPlan
from fedsim.privacy.ledger import Ledger
from fedsim.release import Release
from fedsim.seeds import Seeds
from server.dispatch import Dispatcher
from server.round import Budget, Round
from server.sharded import Members, ShardedOptimizer, ShardedRound, StateLost, WorkerGroup

WORKERS = 4
ROUNDS = 8
SEEDS = Seeds(sampling=1, noise=2, repeats=True)
ADAM = OptimizerConfig(name="adam", learning_rate=0.01, average="exponential")
PLAN = UlsPlan(
    num_users=40,
    sampling_probability=0.3,
    group_size=1,
    clip_norm=1.0,
    noise_multiplier=1.3,
    steps=ROUNDS,
    delta=1e-5,
)


class Users:
    """One row a user."""

    num_users = 40
    num_rows = 40
    user_offsets = np.arange(41, dtype=np.int64)
    row_lengths = np.full(40, 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a file named after a moment lets one of the workers die in it."""
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="module")
def started(marks: Path) -> Iterator[RayGrid]:
    """Workers of all tests: they hold what the last group that was formed had them take."""
    with RayGrid(partial(known_app, str(marks)), workers=WORKERS, object_store_bytes=200 << 20) as grid:
        yield grid


@pytest.fixture
def grid(started: RayGrid, marks: Path) -> RayGrid:
    """All of them, those that were killed replaced."""
    for left in marks.iterdir():
        left.unlink()
    _all_up(started)
    return started


def initial() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SIZE, dtype=np.float32)


def sharded(
    grid: RayGrid, ledger: Ledger, exact: bool = True, timeout: float = 60.0
) -> tuple[ShardedRound, Dispatcher]:
    roster = Members(grid)
    group = WorkerGroup(grid, roster, ADAM, ROUNDS, SIZE, timeout=timeout)
    made = ShardedRound(
        PLAN,
        Users(),  # type: ignore[arg-type]
        SEEDS,
        Budget(PLAN, ledger, 1000.0),
        Release(PLAN, {"all": SIZE}, SEEDS.noise, exact=exact),
        ShardedOptimizer(initial(), ADAM, ROUNDS, group),
        exact=exact,
    )
    return made, Dispatcher(grid, roster=roster)


def todays(folder: Path, rounds: int, exact: bool = True) -> Round:
    """The path of today, in this process."""
    folder.mkdir()
    with Ledger.open(folder / "ledger.jsonl") as ledger:
        made = Round(
            PLAN,
            Users(),  # type: ignore[arg-type]
            SEEDS,
            Budget(PLAN, ledger, 1000.0),
            Release(PLAN, {"all": SIZE}, SEEDS.noise, exact=exact),
            ServerOptimizer(initial(), ADAM, ROUNDS),
            exact=exact,
        )
        grid = LocalGrid(app_of(lambda config: Known(str(folder))), {}, workers=1)  # type: ignore[arg-type,return-value]
        gather = Dispatcher(grid).gather
        for number in range(rounds):
            made.run(number, gather)
    return made


def assert_same(found: Round, expected: Round) -> None:
    ours, theirs = found.state(), expected.state()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert np.array_equal(ours[name], value), name


def _all_up(grid: RayGrid) -> None:
    """Until those that were killed are replaced: two neighbours at once would be too many."""
    end = time.monotonic() + 300
    while len(grid.get_node_ids()) < WORKERS:
        assert time.monotonic() < end
        time.sleep(0.2)


MOMENTS = ("train", "sum_of", "reduce_scatter", "all_gather", "passed_on")


def test_killed_before_and_during_commits_the_bits_are_todays(grid: RayGrid, marks: Path, folder: Path) -> None:
    """Round after round another moment; each costs its round nothing but time, and no charge."""
    expected = todays(folder / "today", 1 + len(MOMENTS))
    with Ledger.open(folder / "ledger.jsonl") as ledger:
        made, dispatcher = sharded(grid, ledger)
        for number, moment in enumerate(("", *MOMENTS)):
            _all_up(grid)
            if moment:
                (marks / moment).touch()
            statistics = made.run(number, dispatcher.gather)
            assert statistics["units"] == statistics["rows"] == len(made.units(number))
            assert not moment or not (marks / moment).exists()
        assert len(ledger) == 1 + len(MOMENTS)
        assert made.norms == pytest.approx(expected.norms)
        # One that is idle, and whom nobody misses until its state is asked for.
        members = made.optimizer.group.roster
        worker, process = sorted(members.processes.items())[1]
        os.kill(process, signal.SIGKILL)
        assert worker in members.workers()
        assert_same(made, expected)
        assert worker not in members.workers()


def test_two_neighbours_at_once_are_too_many(grid: RayGrid, folder: Path) -> None:
    with Ledger.open(folder / "ledger.jsonl") as ledger:
        made, dispatcher = sharded(grid, ledger)
        made.run(0, dispatcher.gather)
        for worker in (1, 2):
            os.kill(grid.process_ids[worker], signal.SIGKILL)
        with pytest.raises(StateLost, match="go on from the last checkpoint"):
            made.state()


def test_a_state_goes_from_one_number_of_workers_to_another_and_to_one_process(grid: RayGrid, folder: Path) -> None:
    expected = todays(folder / "today", 3)
    with Ledger.open(folder / "ledger.jsonl") as ledger:
        made, dispatcher = sharded(grid, ledger)
        made.load_state(todays(folder / "before", 2).state())
        made.run(2, dispatcher.gather)
        assert_same(made, expected)


@pytest.mark.parametrize(("exact", "frozen"), [(False, False), (True, True)])
def test_a_sum_of_other_bits_gets_other_noise_and_the_same_sum_the_same(
    grid: RayGrid, marks: Path, folder: Path, exact: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is killed, or hangs, when the others have drawn noise for a sum that it is in."""
    keys = []
    commit = WorkerGroup.commit

    def noted(self: WorkerGroup, parts: Any, dtype: str, noise: Any) -> Any:
        keys.append(noise["key"])
        return commit(self, parts, dtype, noise)

    monkeypatch.setattr(WorkerGroup, "commit", noted)
    expected = todays(folder / "today", 2, exact)
    with Ledger.open(folder / "ledger.jsonl") as ledger:
        made, dispatcher = sharded(grid, ledger, exact, timeout=20.0 if frozen else 60.0)
        made.run(0, dispatcher.gather)
        if frozen:
            (marks / "freeze").touch()
        (marks / "all_gather").touch()
        made.run(1, dispatcher.gather)
        assert len(ledger) == 2
        assert len(keys) == 3
        assert len(set(keys)) == (2 if exact else 3)
        if exact:
            assert_same(made, expected)
        else:
            assert not np.allclose(made.parameters, expected.parameters, atol=1e-4)
