"""Correlated noise for users who take turns, made afresh from its definition: what it releases against what it costs.

Everything that T rounds release is a vector y = s + σ‖c‖·C⁻¹ξ, s_t what the user puts in to round t. Its likelihood
with the user over that without is a sum over groups and over who joined when, so the loss is exact, also where the
adversary chooses what the user puts in by what was released before. δ(ε) is then a mean, estimated with its error.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from scipy import special, stats

from fedsim.plan import ElsPlan, Plan, UlsPlan
from fedsim.privacy.accountant import delta_bounds
from fedsim.privacy.mechanisms.banded.coefficients import optimal_coefficients
from fedsim.privacy.mechanisms.banded.workload import Workload
from fedsim.sampling import CyclicPoisson

ROUNDS, GROUP_SIZE = 6, 2
SAMPLES = 40_000
ERRORS = 5
"""Standard errors by which an estimate may be off."""
EPSILONS = (0.0, 0.5, 1.0, 2.0)

Adversary = Callable[[np.ndarray], np.ndarray]
"""What every unit of the user puts in to the next round, from what was released [samples, rounds so far]."""


def always(released: np.ndarray) -> np.ndarray:
    return np.ones(len(released))


def in_turns(released: np.ndarray) -> np.ndarray:
    return np.full(len(released), (-1.0) ** released.shape[1])


def against_what_was_seen(released: np.ndarray) -> np.ndarray:
    """Against the noise that the next round takes back, so far as releases show it."""
    return np.where(released[:, -1:].sum(axis=1) > 0.3, -1.0, 1.0)


def only_after_luck(released: np.ndarray) -> np.ndarray:
    """Nothing, until releases look as if the user were there."""
    return np.where(released.sum(axis=1) >= 0, 1.0, 0.0)


@dataclass(frozen=True)
class Joining:
    """How often units of a user may join each round.

    Attributes:
        weights: Probability of each case, float64 [cases].
        counts: Units that join each round, float64 [cases, ROUNDS].
    """

    weights: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, weights: list[float], counts: list[np.ndarray]) -> "Joining":
        """Cases, those that are alike put together."""
        cases, place = np.unique(np.array(counts), axis=0, return_inverse=True)
        return cls(np.bincount(place.ravel(), weights, minlength=len(cases)), cases.astype(np.float64))

    def beside(self, other: "Joining") -> "Joining":
        """Both, independently."""
        weights = [a * b for a in self.weights for b in other.weights]
        return Joining.of(weights, [a + b for a in self.counts for b in other.counts])


NOBODY = Joining(np.ones(1), np.zeros((1, ROUNDS)))


def in_its_turn(bands: int, probability: float, units: int, groups: tuple[int, ...] | None = None) -> Joining:
    """A user whose units all are in its group, drawn from these; by default from all."""
    weights, counts = [], []
    law = stats.binom(units, probability)
    chosen = tuple(range(bands)) if groups is None else groups
    for group in chosen:
        turns = np.arange(group, ROUNDS, bands)
        for joined in itertools.product(range(units + 1), repeat=len(turns)):
            case = np.zeros(ROUNDS)
            case[turns] = joined
            weights.append(float(np.prod(law.pmf(joined))) / len(chosen))
            counts.append(case)
    return Joining.of(weights, counts)


def in_any_round(probability: float, units: int) -> Joining:
    """A user who does not wait for its turn."""
    return in_its_turn(1, probability, units)


def matrix(c: np.ndarray) -> np.ndarray:
    """C, float64 [ROUNDS, ROUNDS]."""
    return sum(value * np.eye(ROUNDS, k=-lag) for lag, value in enumerate(c))  # type: ignore[return-value]


def losses(
    plan: Plan,
    with_user: Joining,
    without: Joining,
    present: bool,
    adversary: Adversary,
    *,
    length: float | None = None,
    samples: int = SAMPLES,
) -> np.ndarray:
    """log of the likelihood with the user over that without, of releases drawn with it or without, float64 [samples].

    Args:
        plan: Gives c and σ.
        with_user: Who joins with the user.
        without: Who joins without.
        present: In which world releases are drawn.
        adversary: What each unit puts in, that of others too.
        length: In place of ‖c‖₂.
        samples: How many.
    """
    c = np.array(plan.noise_coefficients)
    mix, std = matrix(c), plan.noise_multiplier * (np.linalg.norm(c) if length is None else length)
    generator = np.random.default_rng([plan.bands, present])
    world = with_user if present else without
    joined = world.counts[generator.choice(len(world.weights), size=samples, p=world.weights)]
    noise = std * generator.standard_normal((samples, ROUNDS)) @ np.linalg.inv(mix).T
    released, put_in = np.zeros((samples, ROUNDS)), np.zeros((samples, ROUNDS))
    for t in range(ROUNDS):
        put_in[:, t] = adversary(released[:, :t])
        released[:, t] = joined[:, t] * put_in[:, t] + noise[:, t]
    return _log_likelihood(released, put_in, with_user, mix, std) - _log_likelihood(
        released, put_in, without, mix, std
    )


def _log_likelihood(
    released: np.ndarray, put_in: np.ndarray, world: Joining, mix: np.ndarray, std: float
) -> np.ndarray:
    """Of C·y, whose noise is independent, up to what is the same in every world."""
    along = (put_in * (released @ mix.T @ mix)) @ world.counts.T
    first, second = np.triu_indices(ROUNDS)
    gram = (mix.T @ mix)[first, second] * np.where(first == second, 1, 2)
    squares = (put_in[:, first] * put_in[:, second]) @ (gram * world.counts[:, first] * world.counts[:, second]).T
    return special.logsumexp((along - squares / 2) / std**2, axis=1, b=world.weights)


def deltas(plan: Plan, user: Joining, adversary: Adversary, others: Joining = NOBODY, **more: Any) -> np.ndarray:
    """δ at each ε, estimated: [remove or add, EPSILONS, (estimate, standard error)]."""
    together = user if others is NOBODY else user.beside(others)
    found = np.zeros((2, len(EPSILONS), 2))
    for way, present in enumerate((True, False)):
        loss = losses(plan, together, others, present, adversary, **more)
        for place, epsilon in enumerate(EPSILONS):
            gained = -np.expm1(np.minimum(epsilon - (loss if present else -loss), 0.0))
            found[way, place] = gained.mean(), gained.std() / np.sqrt(len(loss))
    return found


@lru_cache
def certified(plan: Plan) -> tuple[tuple[float, float], ...]:
    """(lower, upper) of the certified δ at each ε."""
    found = [delta_bounds(plan.event(), epsilon) for epsilon in EPSILONS]
    return tuple((one.lower, one.upper) for one in found)


def plan_of(algorithm: str, bands: int) -> Plan:
    common: dict[str, Any] = {
        "sampling_probability": 0.2,
        "clip_norm": 1.0,
        "noise_multiplier": 1.2 if algorithm == "uls" else 2.0,
        "steps": ROUNDS,
        "delta": 1e-3,
        "sampling": CyclicPoisson(groups=bands),
        "noise_coefficients": optimal_coefficients(bands, Workload.prefix_sums(ROUNDS)),
    }
    if algorithm == "uls":
        return UlsPlan(num_users=2, group_size=1, **common)
    return ElsPlan(num_examples=2 * GROUP_SIZE, group_size=GROUP_SIZE, **common)


def units_of(plan: Plan) -> int:
    return 1 if isinstance(plan, UlsPlan) else GROUP_SIZE


def probability_of(plan: Plan) -> float:
    return plan.bands * plan.sampling_probability


CASES = [(algorithm, bands) for algorithm in ("uls", "els") for bands in (2, 3)]


@pytest.mark.parametrize("adversary", [always, in_turns, against_what_was_seen, only_after_luck])
@pytest.mark.parametrize(("algorithm", "bands"), CASES)
def test_no_adversary_learns_more_than_is_certified(algorithm: str, bands: int, adversary: Adversary) -> None:
    plan = plan_of(algorithm, bands)
    user = in_its_turn(bands, probability_of(plan), units_of(plan))
    for estimate in deltas(plan, user, adversary):
        for (value, error), (_, upper) in zip(estimate, certified(plan), strict=True):
            assert value - ERRORS * error <= upper


def test_another_user_hides_a_user_at_most_better() -> None:
    plan = plan_of("uls", 2)
    user = in_its_turn(2, probability_of(plan), 1)
    alone, together = deltas(plan, user, always), deltas(plan, user, always, others=user)
    assert (together[..., 0] <= alone[..., 0] + ERRORS * (alone + together)[..., 1]).all()


@pytest.mark.parametrize(("algorithm", "bands"), CASES)
def test_whoever_knows_the_users_group_learns_as_much_as_is_certified(algorithm: str, bands: int) -> None:
    plan = plan_of(algorithm, bands)
    # The first group's rounds are all at least a band from the end, and no fewer than any other's.
    user = in_its_turn(bands, probability_of(plan), units_of(plan), groups=(0,))
    worst = deltas(plan, user, always).max(axis=0)
    for (value, error), (lower, upper) in zip(worst, certified(plan), strict=True):
        assert lower - ERRORS * error <= value <= upper + ERRORS * error


@pytest.mark.parametrize(("algorithm", "bands"), CASES)
def test_noise_without_the_norm_or_users_without_turns_give_more_away(algorithm: str, bands: int) -> None:
    plan = plan_of(algorithm, bands)
    in_turn = in_its_turn(bands, probability_of(plan), units_of(plan), groups=(0,))
    any_time = in_any_round(probability_of(plan), units_of(plan))
    bound = np.array(certified(plan))[:, 1]
    for found in (
        deltas(plan, in_turn, always, length=1.0),
        deltas(plan, any_time, always, samples=8000),
        deltas(plan, any_time, only_after_luck, samples=8000),
    ):
        value, error = found.max(axis=0).T
        assert (value - ERRORS * error > bound)[1:3].all()


@pytest.mark.parametrize("bands", [2, 3])
def test_one_turn_fewer_than_bands_gives_more_away(bands: int) -> None:
    plan = plan_of("uls", bands)
    too_near = in_its_turn(bands - 1, probability_of(plan), 1, groups=(0,))
    value, error = deltas(plan, too_near, always).max(axis=0).T
    assert (value - ERRORS * error > np.array(certified(plan))[:, 1])[1:3].all()
