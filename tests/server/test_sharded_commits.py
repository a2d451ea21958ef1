"""Rounds that workers release: what they say of a commit is compared, and one that was lost and runs again has the
same cohort under the same noise, or another under other."""

import dataclasses
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim.config import OptimizerConfig
from fedsim.engine.kept import KeptParameters, KeptPart, KeptSum
from fedsim.engine.local import LocalGrid
from fedsim.engine.shard_messages import PARAMETERS, Committed, TakeRequest, Told
from fedsim.engine.work import Gathered, Work
from fedsim.errors import Failure
from fedsim.plan import UlsPlan
from fedsim.privacy.ledger import Ledger
from fedsim.release import Release
from fedsim.seeds import Seeds
from server.round import Budget, Diverged
from server.sharded import Members, ShardedOptimizer, ShardedRound, WorkerGroup
from server.sharded.workers import GroupBroken

SIZE = 50
PLAN = UlsPlan(
    num_users=400,
    sampling_probability=0.1,
    group_size=1,
    clip_norm=1.0,
    noise_multiplier=1.3,
    steps=8,
    delta=1e-5,
)


class Users:
    """One row a user."""

    num_users = num_rows = 400
    user_offsets = np.arange(401, dtype=np.int64)
    row_lengths = np.full(400, 8)


def gather(request: Work, costs: np.ndarray, **_: Any) -> Gathered:
    part = KeptPart(name="part", units=request.units, statistics={}, norms=np.zeros(0, np.float32))
    dtype = "int64" if request.resolution else "float32"
    total = KeptSum(parts=(part,), size=SIZE, dtype=dtype, norm=0.0)
    return Gathered(
        total=total, statistics={}, units=len(request.units), messages=1, failures=(), seconds=0, compute_seconds=0
    )


class Workers:
    """They commit, after so many times that they could not; and take down for which cohort, under which noise."""

    def __init__(self) -> None:
        self.failures = 0
        self.finite = True
        self.released: list[tuple[tuple[int, ...], str]] = []
        self.cohort: tuple[int, ...] = ()

    def gather(self, request: Work, costs: np.ndarray, **more: Any) -> Gathered:
        self.cohort = tuple(request.units.tolist())
        return gather(request, costs, **more)

    def commit(self, parts: Any, dtype: str, noise: Any) -> list[Committed]:
        if self.failures:
            self.failures -= 1
            raise GroupBroken("a worker is gone")
        self.released.append((self.cohort, noise["key"]))
        return [Committed(parts=tuple(parts), checksum=1, finite=self.finite, square=1.0, seconds={})]

    def round(self, ledger: Ledger, exact: bool, seeds: Seeds) -> ShardedRound:
        """As a run has it that begins, or goes on."""
        optimizer = Mock(vector=KeptParameters(group="these", version=0, size=SIZE))
        optimizer.group = Mock(whole=True, attempts=3, commit=self.commit)
        optimizer.regroup.return_value = {"part"}
        release = Release(PLAN, {"all": SIZE}, seeds.noise, exact=exact)
        budget = Budget(PLAN, ledger, 1000.0)
        self.optimizer = optimizer
        return ShardedRound(PLAN, Users(), seeds, budget, release, optimizer, exact=exact)  # type: ignore[arg-type]


@pytest.mark.parametrize("failures", [0, 1])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_no_cohort_is_released_under_two_noises_nor_two_sums_under_one(
    tmp_path: Path, exact: bool, given: bool, failures: int
) -> None:
    """Released, lost before a checkpoint, and run again: by workers of whom some fail in between, or none."""
    workers, seeds = Workers(), Seeds(sampling=1, noise=2, repeats=given)
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        for fail in (failures, 0, 0):
            workers.failures = fail
            workers.round(ledger, exact, seeds).run(3, workers.gather)
        assert len(ledger) == 3
    cohorts, keys = ({one[place] for one in workers.released} for place in (0, 1))
    # Exact sums are the same bits, whoever forms them; floats are not.
    assert len(cohorts) == len(keys) == (1 if exact and given else 3)


def test_a_sum_of_other_units_than_were_asked_for_is_not_committed(tmp_path: Path) -> None:
    workers = Workers()

    def too_few(request: Work, costs: np.ndarray, **_: Any) -> Gathered:
        return gather(dataclasses.replace(request, units=request.units[1:]), costs)

    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        made = workers.round(ledger, True, Seeds(sampling=1, noise=2))
        with pytest.raises(Failure, match="does not stand for exactly the units asked for"):
            made.run(3, too_few)
    assert not workers.released


def test_a_step_beyond_all_numbers_does_not_stand(tmp_path: Path) -> None:
    workers = Workers()
    workers.finite = False
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        made = workers.round(ledger, True, Seeds(sampling=1, noise=2))
        with pytest.raises(Diverged):
            made.run(3, workers.gather)
    workers.optimizer.stepped.assert_not_called()


class Apart(LocalGrid):
    """Passes for workers in processes of their own."""

    in_process = False
    process_ids = {1: 11, 2: 12}  # noqa: RUF012  # a property of the class above


def committing(*answers: Committed) -> ClientApp:
    """Workers that take whatever they are given, and say this of a commit. Of parts that they may keep each has
    every other one."""
    app = ClientApp()

    @app.query("take")
    def take(message: Message, context: Context) -> Message:
        parts = TakeRequest.from_record(message.content).parts
        return Message(Told(parts=parts[context.node_id - 1 :: 2]).to_record(), reply_to=message)

    @app.query("commit")
    def commit(message: Message, context: Context) -> Message:
        return Message(answers[context.node_id - 1].to_record(), reply_to=message)

    return app


def of_parts(*parts: str, checksum: int = 1) -> Committed:
    return Committed(parts=parts, checksum=checksum, finite=True, square=1.0, seconds={})


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([of_parts("a"), of_parts("b")], ""),
        ([of_parts(), of_parts("b", "a")], ""),
        ([of_parts("a"), of_parts()], "each of its parts once"),
        ([of_parts("a", "b"), of_parts("b")], "each of its parts once"),
        ([of_parts("a"), of_parts("c")], "each of its parts once"),
        ([of_parts("a"), of_parts("b", checksum=2)], "do not have the same parameters"),
    ],
)
def test_what_workers_say_of_a_commit_is_compared(answers: list[Committed], reason: str) -> None:
    with Apart(committing(*answers), workers=2) as grid:
        group = WorkerGroup(grid, Members(grid), OptimizerConfig(name="sgd"), 8, SIZE)
        group.form({PARAMETERS: np.zeros(SIZE, np.float32)}, 0)
        if reason:
            with pytest.raises(Failure, match=reason):
                group.commit(("a", "b"), "float32", {})
        else:
            found = group.commit(("a", "b"), "float32", {})
            assert sorted(found, key=lambda one: one.parts) == answers  # in the order in which they came


def test_an_answer_that_cannot_be_read_counts_as_none() -> None:
    with Apart(committing(*[Mock(to_record=RecordDict)] * 2), workers=2) as grid:
        group = WorkerGroup(grid, Members(grid), OptimizerConfig(name="sgd"), 8, SIZE)
        group.form({PARAMETERS: np.zeros(SIZE, np.float32)}, 0)
        with pytest.raises(GroupBroken, match=r"worker 1: it is no reply \(KeyError"):
            group.commit(("a", "b"), "float32", {})


def test_workers_that_meet_anew_keep_what_was_computed() -> None:
    """What is still there of a round's sum need not be computed again."""
    with Apart(committing(), workers=2) as grid:
        group = WorkerGroup(grid, Members(grid), OptimizerConfig(name="sgd"), 8, SIZE)
        optimizer = ShardedOptimizer(np.zeros(SIZE, np.float32), OptimizerConfig(name="sgd"), 8, group)
        assert optimizer.regroup(("a", "b", "c")) == {"a", "b", "c"}
        assert optimizer.regroup() == set()
