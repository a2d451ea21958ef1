"""Whether units are sampled as often as accounted, anew in every round, and where users take turns in these alone.

Each test fails by chance less than once in ten million.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy

from experiments.audit.canaries import CanaryUsers
from experiments.audit.contributions import MOST_ROWS
from experiments.audit.rig import OnlyRound, without_gradients
from experiments.audit.turns import owners, turns
from fedsim.data.contribution import bounded_rows
from fedsim.plan import Plan
from fedsim.privacy.events import TruncatedPoissonSubsampledGaussian

ROUNDS, CYCLES, MOST_UNITS = 50, 3, 100_000
"""Rounds in which units are looked at, turns of each user at least, and units that are told apart, at most."""
CHANCE = 1e-7
"""Probability with which one test of a law may fail by chance."""
TWICE = "a unit was sampled twice in one round"
ALIKE = "two rounds had more units in common than by chance"
NOT_KEPT = "a row was sampled that is not among those kept"

Rounds = tuple[list[np.ndarray], int]
"""Units of rounds that draw from the same ones, and how many these are."""


def samples(plan: Plan, seed: int) -> list[str]:
    """How often units take part, and how often in two rounds, against the probability that is accounted.

    Each round is lost once and runs again.
    """
    if plan.scheme.separation > 1:
        return _samples_in_turn(plan, seed)
    plan, users, ids = _with_users(plan, seed)
    round = without_gradients(plan, users, 2, seed, seed + 1).round()
    population = min(plan.population, MOST_UNITS)
    watched = ids[np.sort(np.random.default_rng(seed).choice(plan.population, size=population, replace=False))]
    drawn, sizes, twice, strange = [], [], False, False
    for number in range(ROUNDS):
        for units in _lost_once(round, number):
            twice |= len(np.unique(units)) != len(units)
            strange |= bool(np.isin(units, ids, invert=True).any())
            drawn.append(np.flatnonzero(np.isin(watched, units)))
            sizes.append(len(units))
    event = plan.step_event()
    capped = event if isinstance(event, TruncatedPoissonSubsampledGaussian) else None
    accounted = getattr(event, "sampling_probability", plan.normaliser / plan.population)
    probability = accounted if capped is None else _share_taken(capped)
    broken = [TWICE] * twice + [NOT_KEPT] * strange
    counts = np.bincount(np.concatenate(drawn), minlength=population)
    # Whatever the scheme, a unit is in a round with this probability; no scheme may pack a unit's rounds together.
    if _far_from(int(counts.sum()), len(drawn) * population, probability):
        found, right = counts.sum() / len(drawn), probability * population
        broken.append(f"{found:.4g} units a round were sampled, not {right:.4g}")
    if scipy.stats.binom.sf(counts.max() - 1, len(drawn), probability) * population < CHANCE:
        broken.append(f"a unit was in {counts.max()} of {len(drawn)} rounds at probability {probability:.3g}")
    if probability < 1 and _alike([(drawn, population)], probability):
        broken.append(ALIKE)
    if capped is not None:
        broken += _beside_the_cap(capped, np.array(sizes), counts)
    return broken


def _share_taken(event: TruncatedPoissonSubsampledGaussian) -> float:
    """The chance of each unit that an event with a cap stands for: E[min(X, B)]/N of X ~ Bin(N, q)."""
    n, q, cap = event.population_size, event.sampling_probability, event.most_units
    return float(q * scipy.stats.binom.cdf(cap - 2, n - 1, q) + cap / n * scipy.stats.binom.sf(cap - 1, n, q))


def _beside_the_cap(event: TruncatedPoissonSubsampledGaussian, sizes: np.ndarray, counts: np.ndarray) -> list[str]:
    """How rounds keep to a cap: never above it, at it as often as accounted, and no place preferred where it cuts.

    Args:
        event: What is accounted.
        sizes: Units of each round.
        counts: Rounds of each unit that was watched, in the order of their places.
    """
    n, q, cap = event.population_size, event.sampling_probability, event.most_units
    broken = []
    if sizes.max() > cap:
        broken.append(f"a round had {sizes.max()} units, above its cap of {cap}")
    full, share = int((sizes >= cap).sum()), float(scipy.stats.binom.sf(cap - 1, n, q))
    if _unlikely(full, len(sizes), share) or _unlikely(len(sizes) - full, len(sizes), 1 - share):
        broken.append(f"{full} of {len(sizes)} rounds were at their cap, at a probability of {share:.3g}")
    half = len(counts) // 2
    first, total, share = int(counts[:half].sum()), int(counts.sum()), half / len(counts)
    # Of a uniform subset fewer deviate than of independent ones.
    if _unlikely(first, total, share) or _unlikely(total - first, total, 1 - share):
        broken.append(f"{first} of {total} sampled units were of the first half of all")
    return broken


def _samples_in_turn(plan: Plan, seed: int) -> list[str]:
    """The same where a user's rounds must be apart: of users with several units, and in their turns.

    Whose turn is when is drawn for the whole run; given that, units join a round of their user's turn by themselves.
    """
    apart = plan.scheme.separation
    plan, users, ids = _with_users(plan, seed)
    round = without_gradients(plan, users, 2, seed, seed + 1).round()
    owner, turn = owners(plan, users, ids), turns(plan, users, seed)
    last, closest, twice = np.full(users.num_users, -apart), apart, False
    drawn: list[list[np.ndarray]] = [[] for _ in range(apart)]
    for number in range(max(ROUNDS, CYCLES * apart)):
        for sampled in _lost_once(round, number):
            if np.isin(sampled, ids, invert=True).any():
                return [NOT_KEPT]
            units = np.searchsorted(ids, sampled)
            twice |= len(np.unique(units)) != len(units)
            since = number - last[owner[units]]
            closest = min(closest, int(since[since > 0].min(initial=apart)))
            last[owner[units]] = number
            drawn[number % apart].append(units)
    broken = [TWICE] if twice else []
    if closest < apart:
        broken.append(f"a user was in rounds {closest} apart, and noise needs {apart}")
    sizes = np.bincount(turn, minlength=apart)
    evenly = scipy.stats.binom(len(turn), 1 / apart)
    if min(evenly.sf(sizes.max() - 1), evenly.cdf(sizes.min())) * 2 * apart < CHANCE:
        broken.append(f"of {len(turn)} users {sizes.min()} to {sizes.max()} are in one of {apart} turns")
    places = [np.flatnonzero(turn[owner] == one) for one in range(apart)]
    if any(np.isin(units, places[one], invert=True).any() for one in range(apart) for units in drawn[one]):
        return [*broken, "a user was in a round that was not its turn"]
    return broken + _joining(plan, drawn, places)


def _joining(plan: Plan, drawn: list[list[np.ndarray]], places: list[np.ndarray]) -> list[str]:
    """How often units join in their turns.

    Args:
        plan: The plan.
        drawn: Units of each turn's rounds.
        places: Units that have each turn.
    """
    average = plan.normaliser / plan.population
    probability = getattr(plan.step_event(), "sampling_probability", len(drawn) * average)
    if not plan.sampling.amplifies:
        probability = 1.0
    rounds = np.array([len(of_turn) for of_turn in drawn])
    together = [np.concatenate(of_turn) for of_turn in drawn]
    total, trials = sum(map(len, together)), int(sum(rounds * [len(units) for units in places]))
    broken = []
    if _far_from(total, trials, probability):
        found, right = total / rounds.sum(), probability * trials / rounds.sum()
        broken.append(f"{found:.4g} units a round were sampled, not {right:.4g}")
    most = [int(np.bincount(units, minlength=1).max()) for units in together]
    if (scipy.stats.binom.sf(np.array(most) - 1, rounds, probability) * plan.population < CHANCE).any():
        broken.append(f"a unit was in {max(most)} of {rounds.max()} rounds at probability {probability:.3g}")
    within = [
        ([np.searchsorted(units, one) for one in of_turn], len(units))
        for of_turn, units in zip(drawn, places, strict=True)
    ]
    if probability < 1 and _alike(within, probability):
        broken.append(ALIKE)
    return broken


def _with_users(plan: Plan, seed: int) -> tuple[Plan, CanaryUsers, np.ndarray]:
    """The plan, users that make up its population, and the ids of their units, ascending.

    Where a unit is an example, users own from one of them to one more than the group size, which is a small one: what
    becomes of those that own fewer, and of the examples that are not kept, depends on no other number.
    """
    if plan.redraws:
        ids = np.arange(plan.population)
        return plan, CanaryUsers(np.ones(plan.population, dtype=np.int64), np.zeros(plan.population)), ids
    plan = dataclasses.replace(plan, group_size=min(plan.group_size, MOST_ROWS))
    sizes = np.arange(1, plan.group_size + 2)
    cycles, rest = divmod(plan.population, int(np.minimum(sizes, plan.group_size).sum()))
    owned = np.concatenate([np.tile(sizes, cycles), np.ones(rest, dtype=np.int64)])
    users = CanaryUsers(owned, np.zeros(owned.sum()))
    return plan, users, bounded_rows(users, plan.group_size, seed, plan.selection)


def _lost_once(round: OnlyRound, number: int) -> list[np.ndarray]:
    """The units of a round that is lost and runs again."""
    drawn = []
    for _ in range(2):
        drawn.append(round.units(number))
        round.budget.charge(number)
    return drawn


def _alike(sequences: Sequence[Rounds], probability: float) -> bool:
    """Whether rounds share units: any two of them, or neighbours all together where there are few units.

    Args:
        sequences: Rounds that draw from different units.
        probability: Of a unit to be in a round of its sequence.
    """
    pairs = sum(len(drawn) * (len(drawn) - 1) // 2 for drawn, _ in sequences)
    hits: dict[tuple[int, int], int] = {}
    trials: dict[tuple[int, int], int] = {}
    for drawn, population in sequences:
        sizes = np.array([len(units) for units in drawn])
        places = (np.repeat(np.arange(len(drawn)), sizes), np.concatenate(drawn))
        held = scipy.sparse.csr_array((np.ones(sizes.sum()), places), shape=(len(drawn), max(population, 1)))
        shared = (held @ held.T).toarray()
        first, second = np.triu_indices(len(drawn), 1)
        # Of one round's units each is in the other with the probability.
        chances = scipy.stats.binom.sf(shared[first, second] - 1, sizes[first], probability)
        if chances.min(initial=1.0) * pairs < CHANCE:
            return True
        for apart in (1, 2):
            for begin in (0, apart):  # pairs that have no round in common, so that they are independent
                left = np.arange(len(drawn) - apart)
                left = left[left // apart % 2 == begin // apart]
                key = (apart, begin)
                hits[key] = hits.get(key, 0) + int(shared[left, left + apart].sum())
                trials[key] = trials.get(key, 0) + len(left) * population
    return any(_unlikely(hits[key], trials[key], probability**2) for key in hits)


def _far_from(hits: int, trials: int, probability: float) -> bool:
    """Whether so many hits are far too many, or far too few."""
    return _unlikely(hits, trials, probability) or _unlikely(trials - hits, trials, 1 - probability)


def _unlikely(hits: int, trials: int, probability: float) -> bool:
    """Whether so many hits or more are less likely than CHANCE in independent trials."""
    return bool(scipy.stats.binom.sf(hits - 1, trials, min(probability, 1.0)) < CHANCE)
