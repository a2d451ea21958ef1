"""A plan's own round under audit: the server's, with the dispatcher and the clients' workers in this process.

Users' updates are prescribed; sampling, contribution bounding, clipping, summing, charging, noise, division and the
optimizer are the code that trains. What an adversary sees of a round is what it does to the parameters.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from flwr.common.constant import ErrorCode

import server.dispatch
from clients.answers import app_of
from clients.computing import Computing
from clients.worker import Worker
from experiments.audit.canaries import CanaryUsers, PrescribedLoss, PrescribedUpdates
from fedsim.config import OptimizerConfig
from fedsim.engine.grid import error_reply
from fedsim.engine.local import LocalGrid
from fedsim.optimizer import ServerOptimizer
from fedsim.plan import Plan
from fedsim.privacy.events import Composed, Event
from fedsim.privacy.ledger import MODEL_UPDATE, LedgerEntry, merged
from fedsim.release import Release, ReleaseLog
from fedsim.seeds import Seeds
from server.dispatch import Dispatcher
from server.round import Budget, Charges, Gather, Round

FAR = 1000.0
"""How many times as long as its limits a canary's update is."""
USERS, WARM_UP = 16, 4
"""Users of whom each is looked at, and rounds after which scales that follow releases have moved."""


class Listed:
    """Charges in memory, for rounds whose releases nobody gets."""

    def __init__(self) -> None:
        self._entries: list[LedgerEntry] = []

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """All charges, in order."""
        return tuple(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def charge(self, event: Event, *, round: int, purpose: str = MODEL_UPDATE, note: str = "") -> None:
        """Keep a charge, or a note."""
        self._entries.append(LedgerEntry(round=round, purpose=purpose, event=event, note=note))

    def event(self) -> Composed:
        """Everything charged so far."""
        return merged(entry.event for entry in self._entries)


class OnlyRound(Round):
    """The same round where of all units only some are there: sampling and dropping is sampling from those.

    Attributes:
        present: Unit ids; None for all.
    """

    present: np.ndarray | None = None

    def units(self, number: int) -> np.ndarray:
        """Of the units sampled, those present."""
        sampled = super().units(number)
        return sampled if self.present is None else sampled[np.isin(sampled, self.present)]


class FaultyGrid(LocalGrid):
    """A grid on which a worker fails in every second round, and every reply, that one too, comes again late."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._again: list[Message] = []

    def wait(self, message_ids: Iterable[str], timeout: float | None = None) -> list[Message]:
        """The reply to the first of these messages, after one that nobody waits for any more."""
        late, self._again = self._again, []
        return late + super().wait(message_ids, timeout)

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        self._again.append(reply)
        fails = message.metadata.dst_node_id == 1 and int(message.metadata.group_id) % 2
        return error_reply(message, ErrorCode.MESSAGE_UNAVAILABLE, "its reply is late") if fails else reply


@contextlib.contextmanager
def unsaid_failures() -> Iterator[None]:
    """No warning of each message that is computed anew because its worker was made to fail."""

    def unsaid(record: logging.LogRecord) -> bool:
        return record.levelno != logging.WARNING

    server.dispatch.log.addFilter(unsaid)
    try:
        yield
    finally:
        server.dispatch.log.removeFilter(unsaid)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a round shows.

    Attributes:
        sum: The released mean times the normaliser, float64 [P]: the sum with its noise.
        clip_norm: The next round's clip norm.
    """

    sum: np.ndarray
    clip_norm: float


class Rig:
    """A plan, users with known updates, and everything that a run is made of.

    Args:
        plan: The plan; its population is the users'.
        users: The users.
        updates: Update of each token, float32 [tokens, P]: its gradient, or the way of all local steps; or a model
            that has them.
        sampling_seed: Seed of the sampling.
        noise_seed: Seed of the noise; None draws it securely.
        exact: Whether sums are exact.
        workers: Workers that a round is split over.
        grid: What connects them.
    """

    def __init__(
        self,
        plan: Plan,
        users: CanaryUsers,
        updates: np.ndarray | torch.nn.Module,
        *,
        sampling_seed: int,
        noise_seed: int | None,
        exact: bool = False,
        workers: int = 2,
        grid: type[LocalGrid] = LocalGrid,
    ) -> None:
        self.plan, self.users = plan, users
        model = PrescribedUpdates(updates) if isinstance(updates, np.ndarray) else updates
        # So that the whole way of all local steps is the update prescribed.
        steps, learning_rate = plan.local_descent or (1, 1.0)
        loss = PrescribedLoss(1 / (steps * learning_rate))
        worker = Worker(model.eval(), loss, users, Computing(exact=exact))
        self.gather: Gather = Dispatcher(grid(app_of(lambda _: worker), workers=workers)).gather
        self.sizes: Mapping[str, int] = worker.layout.sizes
        self._seeds = Seeds(sampling=sampling_seed, noise=noise_seed)
        self._exact = exact

    def round(
        self,
        present: np.ndarray | None = None,
        charges: Charges | None = None,
        *,
        log: ReleaseLog | None = None,
        other_noise: int = 0,
    ) -> OnlyRound:
        """The plan's round, from parameters of zero, stepping by the released mean itself.

        Args:
            present: The units that are there; None for all.
            charges: Where rounds are charged.
            log: Where releases with correlated noise are kept; where there is none, one that runs again, in order
                from round 0, draws sample and noise anew.
            other_noise: Added to the seed of the noise.
        """
        seeds = self._seeds
        if seeds.noise is not None:
            seeds = dataclasses.replace(seeds, noise=seeds.noise + other_noise)
        parameters = np.zeros(sum(self.sizes.values()), dtype=np.float32)
        step = OptimizerConfig(name="sgd", learning_rate=1.0)
        made = OnlyRound(
            self.plan,
            self.users,
            seeds,
            Budget(self.plan, Listed() if charges is None else charges, np.inf),
            Release(self.plan, self.sizes, seeds.noise, exact=self._exact),
            ServerOptimizer(parameters, step, self.plan.steps),
            exact=self._exact,
            log=log,
        )
        made.present = present
        return made

    def units_of_noise(self, round: Round) -> np.ndarray:
        """Clip norm times scale of each value in the coming round, float64 [P]: a sum over this is whitened."""
        clip = round.release.clip
        return clip.norm * np.repeat([clip.scales.get(name, 1.0) for name in self.sizes], list(self.sizes.values()))

    def seen(self, round: Round, number: int) -> Seen:
        """What one more round shows."""
        before = round.parameters.astype(np.float64)
        round.run(number, self.gather)
        mean = before - round.parameters.astype(np.float64)
        return Seen(sum=mean * self.plan.normaliser, clip_norm=round.release.clip_norm)


def state_of(round: Round) -> dict[str, np.ndarray]:
    """A copy of a round's state, for going back to."""
    return {name: np.array(array) for name, array in round.state().items()}


def without_gradients(plan: Plan, users: CanaryUsers, size: int, seed: int, noise_seed: int | None) -> Rig:
    """Users who put nothing in, each value of the sum of so many.

    Args:
        plan: The plan.
        users: The users, whose tokens are all 0.
        size: Values of a sum.
        seed: Seed of the sampling.
        noise_seed: Seed of the noise; None draws it securely.
    """
    nothing = np.zeros((1, size), dtype=np.float32)
    return Rig(plan, users, nothing, sampling_seed=seed, noise_seed=noise_seed, workers=1)
