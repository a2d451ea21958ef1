"""Black-box canaries: held-out users put into training by fair coins, once or several times, or not at all.

Training is the plan's own round, with the worker and the dispatcher of a run in this process. Put in several times, a
user is as many users: the guarantee of the plan is for one, so the attack shows how fast it fades for groups, and that
the attack works at all.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.audit.training import JoinedUsers, train_in_place
from fedsim.config import RunConfig
from fedsim.models.evaluate import evaluate_rows
from fedsim.plan import Plan, UserSizes
from fedsim.privacy.audit.claim import epsilon_free
from fedsim.privacy.audit.membership import AttackArea, attack_area
from fedsim.privacy.audit.rates import attack_rates
from fedsim.resources import Resources, open_resources


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """User inference on canaries that took part a number of times.

    Attributes:
        repetitions: How many users each canary is; 0 is the control, in which no coin matters.
        area: Area under the curve of canaries in against canaries out.
        epsilon_lower: Lower bound on the ε of a group of so many users.
        canaries: How many were in, and out.
    """

    repetitions: int
    area: AttackArea
    epsilon_lower: float
    canaries: tuple[int, int]

    def in_words(self) -> str:
        """Two sentences."""
        area = self.area
        return (
            f"Black-box canaries, each in training {self.repetitions} times, {self.canaries[0]} in and "
            f"{self.canaries[1]} out: AUC {area.area:.3f} ({area.lower:.3f} to {area.upper:.3f}; 0.5 is guessing), "
            f"ε of the group at least {self.epsilon_lower:.2f} at {area.confidence:.0%} confidence. "
            "Evidence, no proof; and not private: it trained again on the private users, which no ledger charges."
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**dataclasses.asdict(self), "kind": "evidence", "private": False, "in_words": self.in_words()}


def black_box_canaries(
    config: RunConfig, plan: Plan, *, canaries: int, repetitions: int, confidence: float, seed: int
) -> Repetition:
    """Train once with canaries from the test users, and tell from the model which were in.

    Args:
        config: Model, data, optimizer.
        plan: The plan; its population grows by the canaries that are in.
        canaries: How many test users, at most.
        repetitions: How many users each canary that is in stands for.
        confidence: Of the interval and the bound.
        seed: Seed of coins, sampling and noise.
    """
    resources = open_resources(config)
    test = resources.store.split("test")
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(test.num_users, size=min(canaries, test.num_users), replace=False))
    coins = generator.permutation(np.arange(len(chosen)) % 2 == 0)
    before = _user_losses(resources, chosen)
    _train(config, plan, resources, np.repeat(chosen[coins], repetitions), seed)
    gained = before - _user_losses(resources, chosen)
    finite = np.isfinite(gained)
    inside, outside = gained[coins & finite], gained[~coins & finite]
    rates = attack_rates(generator.permutation(inside), generator.permutation(outside), confidence=confidence)
    return Repetition(
        repetitions=repetitions,
        area=attack_area(inside, outside, confidence=confidence),
        epsilon_lower=epsilon_free(rates, plan.delta),
        canaries=(len(inside), len(outside)),
    )


def _train(config: RunConfig, plan: Plan, resources: Resources, copies: np.ndarray, seed: int) -> None:
    """Train the resources' model in place on its training users and copies of test users."""
    train = resources.store.split("train")
    train_in_place(
        config,
        plan,
        resources.loaded,
        JoinedUsers(train, resources.store.split("test"), copies),
        optimizer=config.optimizer_for(plan, UserSizes.of_users(train)),
        row_tokens=resources.row_tokens,
        seed=seed,
    )


def _user_losses(resources: Resources, users: np.ndarray) -> np.ndarray:
    """Mean loss of each test user under the resources' model, float64 [users]."""
    test = resources.store.split("test")
    sizes = np.diff(test.user_offsets)[users]
    indices = np.repeat(test.user_offsets[users] + sizes - np.cumsum(sizes), sizes) + np.arange(sizes.sum())
    owners = np.repeat(np.arange(len(users)), sizes)
    losses = evaluate_rows(resources.loaded.model, test.take(indices), resources.loaded.objective)
    return losses.by_unit(owners, len(users)).losses
