"""A plan's own training under audit: the round of a run, with the worker and the dispatcher, in this process.

Models and users are real ones, or such that hold canaries; `rig.py` prescribes updates instead.
"""

from typing import Protocol

import numpy as np
import torch

from clients.answers import app_of
from clients.computing import Computing
from clients.worker import Worker
from experiments.audit.rig import Listed, OnlyRound
from fedsim.config import OptimizerConfig, RunConfig
from fedsim.engine.local import LocalGrid
from fedsim.gradients import Objective, ParameterLayout
from fedsim.optimizer import ServerOptimizer
from fedsim.plan import Plan
from fedsim.release import Release
from fedsim.rows import Splits, TokenRows, UserView
from fedsim.seeds import Seeds
from server.dispatch import Dispatcher
from server.round import Budget


class Learner(Protocol):
    """A model that is to be trained, and by what."""

    @property
    def model(self) -> torch.nn.Module:
        """In evaluation mode."""

    @property
    def objective(self) -> Objective:
        """What is minimised and measured."""


class Everybody(UserView, Splits, Protocol):
    """Users of whom every split is all."""


class JoinedUsers:
    """The training users, and after them copies of others. Every split is all of them.

    Args:
        users: The training users.
        others: Where the others are.
        copies: Whom of the others each copy is of, int [copies].
    """

    def __init__(self, users: UserView, others: UserView, copies: np.ndarray) -> None:
        firsts, ends = others.user_offsets[copies], others.user_offsets[copies + 1]
        owned = ends - firsts
        self.user_offsets = np.concatenate([users.user_offsets, users.num_rows + np.cumsum(owned)])
        self._users, self._others = users, others
        within = np.arange(owned.sum()) - np.repeat(np.cumsum(owned) - owned, owned)
        self._copied_rows = np.repeat(firsts, owned) + within
        self.row_lengths = np.concatenate([users.row_lengths, others.row_lengths[self._copied_rows]])

    @property
    def num_users(self) -> int:
        """Training users and copies."""
        return len(self.user_offsets) - 1

    @property
    def num_rows(self) -> int:
        """Rows of all of them."""
        return int(self.user_offsets[-1])

    def take(self, row_indices: np.ndarray, /) -> TokenRows:
        """Rows by number."""
        own = row_indices < self._users.num_rows
        copied = self._others.take(self._copied_rows[row_indices[~own] - self._users.num_rows])
        both = TokenRows.joined([self._users.take(row_indices[own]), copied])
        place = np.empty(len(row_indices), dtype=np.int64)
        place[own], place[~own] = np.arange(own.sum()), own.sum() + np.arange((~own).sum())
        return both.take(place)

    def split(self, name: str) -> "JoinedUsers":
        """All users, whatever the split's name."""
        return self


def train_in_place(
    config: RunConfig,
    plan: Plan,
    learner: Learner,
    users: Everybody,
    *,
    optimizer: OptimizerConfig,
    row_tokens: int,
    seed: int,
    present: np.ndarray | None = None,
) -> None:
    """Train a model on users, all rounds of the plan; the charges are kept nowhere.

    Args:
        config: How clients compute.
        plan: The plan; its population becomes that of the users.
        learner: The model, trained in place.
        users: The population, those who are kept out included.
        optimizer: The server's.
        row_tokens: Tokens of the longest row.
        seed: Seed of the sampling; that of the noise is one more.
        present: Units that are there, ids as the plan has them; None for all. A unit that is not there is drawn like
            any other and then missing, so that nobody else's part depends on it.
    """
    layout = ParameterLayout.of(learner.model)
    plan = plan.on(users)
    worker = Worker(learner.model, learner.objective, users, Computing.of(config, row_tokens))
    parameters = np.array(layout.flatten(learner.model).cpu(), dtype=np.float32)
    round = OnlyRound(
        plan,
        users,
        Seeds(sampling=seed, noise=seed + 1),
        Budget(plan, Listed(), np.inf),
        Release(plan, layout.sizes, seed + 1, exact=config.engine.exact),
        ServerOptimizer(parameters, optimizer, plan.steps),
        exact=config.engine.exact,
        row_tokens=row_tokens,
    )
    round.present = present
    dispatcher = Dispatcher(LocalGrid(app_of(lambda _: worker)))
    for number in range(plan.steps):
        round.run(number, dispatcher.gather)
    layout.load(learner.model, round.optimizer.result)
