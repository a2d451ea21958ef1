"""A round looks at no user that it does not draw: counted, not timed."""

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from experiments.audit.rig import Listed
from fedsim.config import OptimizerConfig
from fedsim.engine.work import Gathered, Work
from fedsim.optimizer import ServerOptimizer
from fedsim.plan import ALGORITHMS, Plan, UserSizes, plan_from_json
from fedsim.release import Release
from fedsim.rows import SizeCounts
from fedsim.sampling import CyclicPoisson, Poisson, Sampling, TruncatedPoisson, Turns
from fedsim.seeds import Seeds
from server.round import Budget, Round

USERS, BATCH, SIZE = 200_000, 100, 16
LOOKED_UP = 40 * BATCH


class Values(np.ndarray):
    """An array of which few values may be asked for at a time, and of which nothing may be computed as a whole."""

    def __getitem__(self, index: Any) -> Any:
        found = np.asarray(self)[index]
        assert np.size(found) <= LOOKED_UP, f"{np.size(found)} values were looked at"
        return found

    def __array_ufunc__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("all values were looked at")

    def __array_function__(self, function: Callable[..., Any], types: Any, arguments: Any, options: Any) -> Any:
        assert function is np.searchsorted, f"all values were looked at by {function.__name__}"
        plain = [np.asarray(one) if isinstance(one, Values) else one for one in arguments]
        return function(*plain, **options)


class Guarded:
    """Users of one to seven rows, of whom only those asked for may be looked at."""

    num_users = USERS

    def __init__(self) -> None:
        owned = 1 + np.arange(USERS) % 7
        self.size_counts = SizeCounts.counted(owned)
        self.num_rows = int(owned.sum())
        self.user_offsets = np.concatenate([[0], np.cumsum(owned)]).astype(np.int64).view(Values)
        self.row_lengths = np.full(self.num_rows, 3, dtype=np.int32).view(Values)

    def take(self, row_indices: np.ndarray, /) -> Any:
        raise NotImplementedError


def gathered(users: Guarded) -> Callable[..., Gathered]:
    """A worker that looks its rows up, and adds nothing."""

    def gather(request: Work, costs: np.ndarray, **following: Any) -> Gathered:
        plan_from_json(request.plan).rows_of(users, request.units, request.round, request.sampling_seed)
        assert len(costs) == len(request.units) > 0
        return Gathered(
            total=np.zeros(SIZE, dtype=np.float32),
            statistics={},
            units=len(request.units),
            messages=1,
            failures=(),
            seconds=0.0,
            compute_seconds=0.0,
            phases={},
        )

    return gather


def plan_of(algorithm: str, users: Guarded, sampling: Sampling) -> Plan:
    common: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": 1.0, "steps": 1000, "delta": 1e-8}
    sizes = UserSizes.of_users(users)
    asked = {"gradients_per_round": BATCH, "group_size": {"uls": 1, "els": 3}[algorithm]}
    return ALGORITHMS[algorithm].draft(sizes, **asked, sampling=sampling, **common)


CASES = [
    ("uls", Poisson()),
    ("els", Poisson()),
    ("uls", TruncatedPoisson()),
    ("uls", CyclicPoisson(groups=8)),
    ("els", CyclicPoisson(groups=8)),
    ("uls", Turns()),
]


@pytest.mark.parametrize(("algorithm", "sampling"), CASES, ids=lambda one: getattr(one, "name", one))
def test_a_round_looks_at_its_own_users_and_takes_their_memory(algorithm: str, sampling: Sampling) -> None:
    users = Guarded()
    plan, seeds = plan_of(algorithm, users, sampling), Seeds(sampling=1, noise=2)
    round = Round(
        plan,
        users,
        seeds,
        Budget(plan, Listed(), np.inf),
        Release(plan, {"w": SIZE}, seeds.noise),
        ServerOptimizer(np.zeros(SIZE, dtype=np.float32), OptimizerConfig(), plan.steps),
    )
    gather = gathered(users)
    for number in range(2):  # what a scheme draws once for the whole run is drawn
        round.run(number, gather)
    tracemalloc.start()
    for number in range(2, 6):
        round.run(number, gather)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < USERS, "a byte for each user"


def test_the_guard_guards() -> None:
    users = Guarded()
    for look in (np.diff, np.sort, np.unique, lambda all_users: all_users[1:], lambda all_users: all_users + 1):
        with pytest.raises(AssertionError, match="looked at"):
            look(users.user_offsets)
    assert json.dumps(int(users.user_offsets[-1])) == str(users.num_rows)
