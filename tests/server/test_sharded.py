"""Rounds over Ray actors that form the sums themselves: today's bits, also where workers are killed."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from flwr.clientapp import ClientApp

from clients.app import app_of
from fedsim.config import OptimizerConfig
from fedsim.engine.exact import quantise
from fedsim.engine.local import LocalGrid
from fedsim.engine.ray_grid import RayGrid
from fedsim.engine.work import Done, Work
from fedsim.optimizer import ServerOptimizer
from fedsim.plan import UlsPlan
from fedsim.privacy.ledger import Ledger
from fedsim.randomness import BLOCK
from fedsim.release import Release
from server.dispatch import Dispatcher
from server.identity import Seeds
from server.round import Budget, Round
from server.sharded import Members, ShardedOptimizer, ShardedRound, StateLost, WorkerGroup

SIZE = 4 * BLOCK + 77
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


class Known:
    """A worker whose units' updates are known. Where a file says so it dies: in a unit, or in a part of a commit."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def train(self, request: Work) -> Done:
        self._die("train")
        total = np.zeros(SIZE, dtype=np.int64 if request.resolution else np.float32)
        for unit in request.units.tolist():
            update = np.random.default_rng([unit, request.round]).standard_normal(SIZE, dtype=np.float32)
            update /= np.float32(1.01 * np.linalg.norm(update))
            # What parameters it is computed at shows in it.
            update[:8] += np.float32(1e-4) * np.tanh(np.asarray(request.parameters[:8]))
            total += (
                quantise(update, request.clip, {"all": SIZE}, request.resolution) if request.resolution else update
            )
        return Done(
            round=request.round, units=request.units, total=total, statistics={"rows": float(len(request.units))}
        )

    def _die(self, moment: str) -> None:
        try:
            (self.folder / moment).rename(self.folder / f"{moment}-{os.getpid()}")  # one process alone succeeds
        except OSError:
            return
        if (self.folder / "freeze").exists():
            os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(1)


def known_app(folder: str) -> ClientApp:
    """A ClientApp with such a worker, whose commits may die, too."""
    from fedsim.engine.collective import Peers

    worker = Known(folder)
    for moment in ("sum_of", "reduce_scatter", "all_gather", "passed_on"):
        original = getattr(Peers, moment)

        def dying(self: Peers, *arguments: object, original: object = original, moment: str = moment) -> object:
            worker._die(moment)
            return original(self, *arguments)  # type: ignore[operator]

        setattr(Peers, moment, dying)
    return app_of(lambda config: worker)  # type: ignore[arg-type,return-value]


class Users:
    """One row a user."""

    num_users = 40
    num_rows = 40
    user_offsets = np.arange(41, dtype=np.int64)
    row_lengths = np.full(40, 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    yield
    ray.shutdown()


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


def _all_up(grid: RayGrid, workers: int) -> None:
    """Until those that were killed are replaced: two neighbours at once would be too many."""
    end = time.monotonic() + 300
    while len(grid.get_node_ids()) < workers:
        assert time.monotonic() < end
        time.sleep(0.2)


MOMENTS = ("train", "sum_of", "reduce_scatter", "all_gather", "passed_on")


def test_killed_before_and_during_commits_the_bits_are_todays(folder: Path) -> None:
    """Round after round another moment; each costs its round nothing but time, and no charge."""
    expected = todays(folder / "today", 1 + len(MOMENTS))
    with (
        RayGrid(lambda: known_app(str(folder)), workers=4, cpus_per_worker=1) as grid,
        Ledger.open(folder / "ledger.jsonl") as ledger,
    ):
        made, dispatcher = sharded(grid, ledger)
        for number, moment in enumerate(("", *MOMENTS)):
            _all_up(grid, 4)
            if moment:
                (folder / moment).touch()
            statistics = made.run(number, dispatcher.gather)
            assert statistics["units"] == statistics["rows"] == len(made.units(number))
            assert not moment or not (folder / moment).exists()
        assert len(ledger) == 1 + len(MOMENTS)
        assert_same(made, expected)
        assert made.norms == pytest.approx(expected.norms)
        _all_up(grid, 4)
        # One that is idle, and whom nobody misses until its state is asked for.
        os.kill(grid.process_ids[2], signal.SIGKILL)
        assert_same(made, expected)


def test_two_neighbours_at_once_are_too_many(folder: Path) -> None:
    with (
        RayGrid(lambda: known_app(str(folder)), workers=3, cpus_per_worker=1) as grid,
        Ledger.open(folder / "ledger.jsonl") as ledger,
    ):
        made, dispatcher = sharded(grid, ledger)
        made.run(0, dispatcher.gather)
        for worker in (1, 2):
            os.kill(grid.process_ids[worker], signal.SIGKILL)
        with pytest.raises(StateLost, match="go on from the last checkpoint"):
            made.state()


def test_a_state_goes_from_one_number_of_workers_to_another_and_to_one_process(folder: Path) -> None:
    expected = todays(folder / "today", 3)
    with (
        RayGrid(lambda: known_app(str(folder)), workers=2, cpus_per_worker=1) as grid,
        Ledger.open(folder / "ledger.jsonl") as ledger,
    ):
        made, dispatcher = sharded(grid, ledger)
        made.load_state(todays(folder / "before", 2).state())
        made.run(2, dispatcher.gather)
        assert_same(made, expected)


@pytest.mark.parametrize(("exact", "frozen"), [(True, True), (False, False)])
def test_a_sum_of_other_bits_gets_other_noise_and_the_same_sum_the_same(
    folder: Path, exact: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is killed, or hangs, when the others have drawn noise for a sum that it is in."""
    keys = []
    commit = WorkerGroup.commit

    def noted(self: WorkerGroup, parts: Any, dtype: str, noise: Any) -> Any:
        keys.append(noise["key"])
        return commit(self, parts, dtype, noise)

    monkeypatch.setattr(WorkerGroup, "commit", noted)
    expected = todays(folder / "today", 2, exact)
    with (
        RayGrid(lambda: known_app(str(folder)), workers=3, cpus_per_worker=1) as grid,
        Ledger.open(folder / "ledger.jsonl") as ledger,
    ):
        made, dispatcher = sharded(grid, ledger, exact, timeout=20.0)
        made.run(0, dispatcher.gather)
        if frozen:
            (folder / "freeze").touch()
        (folder / "all_gather").touch()
        made.run(1, dispatcher.gather)
        assert len(ledger) == 2
        assert len(keys) == 3
        assert len(set(keys)) == (2 if exact else 3)
        if exact:
            assert_same(made, expected)
        else:
            assert not np.allclose(made.parameters, expected.parameters, atol=1e-4)
