"""Examples of several owners on the path that training takes: what one user's emptied examples change in a sum."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from clients.worker import Worker
from fedsim.clip import Clip
from fedsim.config import EngineConfig, PlanConfig, RunConfig
from fedsim.data.config import DataConfig
from fedsim.data.owners import owners_in
from fedsim.data.store import UserStore
from fedsim.engine.messages import TrainRequest
from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig, SmallModelConfig
from fedsim.plan import ElsPlan, Plan, UlsPlan, UserSizes, plan_from_json, plan_from_values
from fedsim.plan.fixed_graph import FixedGraphPlan
from fedsim.privacy.events import Adjacency, BinomialMixtureGaussian
from fedsim.release import Release
from fedsim.rows import IGNORED_LABEL, TokenRows
from fedsim.sampling import CyclicPoisson
from fedsim.statement import privacy_statement

TINY = SmallModelConfig(layers=1, width=32, heads=2, vocabulary_size=512, steps=0)
PEOPLE = [f"user {n}" for n in range(30)]
BATCH = 12
C = 0.01
"""Far below the norm of any gradient here: every example adds a vector of this length."""


def rows() -> Iterator[dict[str, Any]]:
    draw = np.random.default_rng(1)
    for number in range(250):
        owners = [
            PEOPLE[n] for n in draw.choice(len(PEOPLE), size=draw.choice([1, 2, 2, 2, 3, 3, 3, 3]), replace=False)
        ]
        words = " ".join(f"word{n}" for n in draw.integers(0, 500, 12))
        yield {"user_id": owners[0], "owners": owners, "text": f"note {number} says {words}"}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("shared")
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    config = RunConfig(
        data=DataConfig(
            source="files",
            path=str(folder / "notes.jsonl"),
            owners_column="owners",
            several_owners="keep",
            sequence_length=32,
            validation_fraction=0.0,
            test_fraction=0.0,
        ),
        model=ModelConfig(small=TINY),
        plan=PlanConfig(algorithm="els", adjacency="fixed-graph"),
        engine=EngineConfig(max_tokens=512),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSIM_CACHE", str(folder / "cache"))
        yield Worker.of(config)


def plan_of(users: UserStore, group_size: int = 3, **changes: Any) -> FixedGraphPlan:
    common = {"clip_norm": C, "noise_multiplier": 1.0, "steps": 20, "delta": 1e-3}
    sizes = UserSizes.of_users(users)
    return FixedGraphPlan.draft(sizes, gradients_per_round=BATCH, group_size=group_size, **(common | changes))


def owners_of(users: UserStore) -> list[list[str]]:
    """The owners of each row."""
    return [owners_in(name) for u, name in enumerate(users.user_ids()) for _ in range(*users.rows_of(u))]


def drawn(plan: Plan, users: UserStore, round: int) -> np.ndarray:
    """Unit ids, as a round of training has them."""
    places = plan.sample(round, 5, population=plan.population_of(users, 5))
    return plan.unit_ids(users, 5)(places)


def summed(worker: Worker, plan: Plan, units: np.ndarray, round: int) -> np.ndarray:
    parameters = worker.layout.flatten(worker.model).numpy()
    request = TrainRequest(
        plan=plan.to_json(), round=round, sampling_seed=5, clip=Clip(norm=C), units=units, parameters=parameters
    )
    reply = worker.train(request)
    np.testing.assert_array_equal(np.sort(reply.units), np.sort(units))
    return reply.total.astype(np.float64)


def emptied(patch: pytest.MonkeyPatch, empty: set[int]) -> None:
    """From now on the store's rows with these numbers say nothing; who owns them stays as it is."""
    take = UserStore.take

    def none_of_it(self: UserStore, row_indices: np.ndarray) -> TokenRows:
        found = take(self, row_indices)
        of_nobody = np.repeat(np.isin(row_indices, list(empty)), found.lengths)
        labels = found.tokens if found.labels is None else found.labels
        return TokenRows(
            tokens=np.where(of_nobody, 0, found.tokens),
            offsets=found.offsets,
            labels=np.where(of_nobody, IGNORED_LABEL, labels),
            classes=found.classes,
        )

    patch.setattr(UserStore, "take", none_of_it)


@pytest.mark.parametrize("group_size", [1, 3])
def test_one_users_emptied_examples_move_a_sum_by_one_clip_for_each_that_was_drawn(
    worker: Worker, group_size: int
) -> None:
    users = worker.store.split("train")
    plan, owners = plan_of(users, group_size), owners_of(users)
    moved = []
    for round in range(3):
        units = drawn(plan, users, round)
        full = summed(worker, plan, units, round)
        for person in PEOPLE[:10]:
            own = {row for row, names in enumerate(owners) if person in names}
            with pytest.MonkeyPatch.context() as patch:
                emptied(patch, own)
                without = worker.store.split("train")
                assert plan.on(without) == plan  # the graph is the same, and so are choice and draw
                np.testing.assert_array_equal(drawn(plan, without, round), units)
                rest = summed(worker, plan, units, round)
            count = len(own & set(units.tolist()))
            distance = float(np.linalg.norm(full - rest))
            assert distance <= count * C * (1 + 1e-4)
            assert count <= group_size
            if count:
                assert distance > 0.1 * C
            moved.append(count)
    assert max(moved) > 0
    assert sum(len(owners[row]) > 1 for row in plan.kept_rows(users, 5)) >= 5 * (group_size > 1)


class Counts:
    """Takes down what a count is before it is noised."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def add_normal(self, total: np.ndarray, std: float) -> None:
        self.seen += total.tolist()


def test_a_clip_norm_that_moves_is_told_no_more_of_an_emptied_example_than_is_charged(worker: Worker) -> None:
    """Sum and count are one Gaussian release, whose sensitivity is that of both: an emptied example may move the count
    by ½, as one that is not there, and by no more."""
    users = worker.store.split("train")
    plan = plan_of(users, clip_quantile=0.5, clip_count_std=0.6)
    owners, parameters = owners_of(users), worker.layout.flatten(worker.model).numpy()
    units = plan.kept_rows(users, 5)  # all of them, at a norm that clips all
    counted = Counts()

    def told() -> tuple[np.ndarray, float]:
        request = TrainRequest(
            plan=plan.to_json(), round=0, sampling_seed=5, clip=Clip(norm=C), units=units, parameters=parameters
        )
        reply = worker.train(request)
        release = Release(plan, worker.sizes, 7)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(release, "_source", lambda *_: counted)
            release.observe(reply.total, parameters, reply.statistics | {"units": float(len(units))}, 0)
        return reply.total.astype(np.float64), counted.seen.pop()

    full, count = told()
    for person in PEOPLE[:8]:
        own = {row for row, names in enumerate(owners) if person in names}
        with pytest.MonkeyPatch.context() as patch:
            emptied(patch, own)
            rest, of_rest = told()
        drawn_of_them = len(own & set(units.tolist()))
        assert abs(count - of_rest) == drawn_of_them / 2
        moved = np.hypot(
            np.linalg.norm(full - rest) / (plan.sum_noise_multiplier * C), (count - of_rest) / plan.clip_count_std
        )
        assert moved <= drawn_of_them / plan.noise_multiplier * (1 + 1e-4)


def test_each_chosen_example_is_a_unit_once_and_nobody_owns_more_than_the_group(worker: Worker) -> None:
    users = worker.store.split("train")
    owners = owners_of(users)
    for group_size in (1, 2, 5, 1000):
        plan = plan_of(users, group_size)
        chosen = plan.unit_ids(users, 5)(np.arange(plan.population))
        assert len(set(chosen.tolist())) == len(chosen) == plan.num_examples
        count = {person: sum(person in owners[row] for row in chosen) for person in PEOPLE}
        assert max(count.values()) <= group_size
    assert plan.num_examples == users.num_rows


def test_a_user_more_or_less_would_change_which_of_others_examples_are_chosen(worker: Worker) -> None:
    """Why adding or removing a user is not claimed: it is not what is hidden."""
    users = worker.store.split("train")
    plan, names = plan_of(users, 1, selection="first"), users.user_ids()
    chosen = set(plan.kept_rows(users, 5).tolist())
    for person in PEOPLE:
        kept = [u for u, name in enumerate(names) if person not in owners_in(name)]
        if _others(plan, users, kept) - chosen:
            return
    raise AssertionError("the choice among others' examples did not depend on anybody")


def _others(plan: FixedGraphPlan, users: UserStore, kept: list[int]) -> set[int]:
    """Rows chosen of these users alone, by their numbers among all."""
    from fedsim.data.greedy import chosen_rows
    from fedsim.data.owners import OwnerSets

    ranges = [users.rows_of(user) for user in kept]
    offsets = np.concatenate([[0], np.cumsum([stop - start for start, stop in ranges])]).astype(np.int64)
    names = users.user_ids()
    numbers = np.concatenate([np.arange(*bounds) for bounds in ranges])
    chosen = chosen_rows(OwnerSets.of_names([names[user] for user in kept]), offsets, plan.group_size, "first")
    return set(numbers[chosen].tolist())


def test_the_event_is_that_of_examples_of_one_owner(worker: Worker) -> None:
    plan = plan_of(worker.store.split("train"))
    event = BinomialMixtureGaussian(
        group_size=3, sampling_probability=BATCH / plan.num_examples, noise_multiplier=plan.noise_multiplier
    )
    assert plan.step_event() == event
    same = ElsPlan(**{name: value for name, value in vars(plan).items() if name != "adjacency"})
    assert (same.step_event(), same.epsilon()) == (plan.step_event(), plan.epsilon())


def test_a_plan_travels_as_what_it_is(worker: Worker) -> None:
    plan = plan_of(worker.store.split("train"))
    assert plan_from_json(plan.to_json()) == plan
    assert type(plan_from_values(plan.to_values())) is FixedGraphPlan


def test_other_plans_hide_no_such_change(worker: Worker) -> None:
    users = worker.store.split("train")
    common = {"group_size": 2, "clip_norm": 1.0, "noise_multiplier": 1.0, "steps": 1, "delta": 1e-3}
    for kind, size in ((ElsPlan, {"num_examples": 9}), (UlsPlan, {"num_users": 9})):
        with pytest.raises(InvalidInput, match=r"plan\.adjacency is 'fixed-graph'"):
            kind(**common, **size, sampling_probability=0.1, adjacency=Adjacency.FIXED_GRAPH)  # type: ignore[arg-type]
    plan = plan_of(users)
    with pytest.raises(InvalidInput, match=r"plan\.algorithm is 'uls'.*els with fixed-graph"):
        plan_from_values(plan.to_values() | {"algorithm": "uls"})
    with pytest.raises(InvalidInput, match=r"plan\.sampling.*poisson where examples have several owners"):
        plan_of(users, sampling=CyclicPoisson(groups=2))
    with pytest.raises(InvalidInput, match=r"plan\.selection"):
        plan_of(users, selection="longest")


def test_the_statements_words_are_the_plans(worker: Worker) -> None:
    plan = plan_of(worker.store.split("train"))
    said = privacy_statement(plan, plan.event(), sizes={"w": 5}, steps=20, versions={})
    for sentence in plan.assumptions:
        assert sentence in said.not_covered
        assert sentence in said.in_words()
    assert plan.contribution_in_words in said.to_json()["contribution_bound"]["in_words"]
    assert "each owner has at most 3" in " ".join(said.not_covered)
    assert said.to_json()["adjacency"] == "fixed-graph"
    assert "--adjacency fixed-graph" in str(said.recompute)
