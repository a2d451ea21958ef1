"""Whether samples, noise and counts are of the laws that are accounted.

Each test fails by chance less than once in ten million.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import sparse, stats

from experiments.audit.canaries import CanaryUsers, sizes_of
from experiments.audit.contributions import MOST_ROWS, ROUNDS
from experiments.audit.rig import FAR, WARM_UP, OnlyRound, Rig, state_of, without_gradients
from fedsim.plan import Plan
from fedsim.privacy.events import TruncatedPoissonSubsampledGaussian
from fedsim.privacy.mechanisms import GaussianNoise, Noise
from fedsim.privacy.mechanisms.laplace.event import RandomisedScaleLaplace
from fedsim.privacy.mechanisms.laplace.inverse_scale import log_mgf
from fedsim.release import CLIP_NORM
from server.round import PARAMETERS, RELEASE

SAMPLED_ROUNDS, MOST_UNITS = 50, 100_000
"""Rounds in which units are looked at, and units that are told apart, at most."""
NOISE_VALUES = 4096
SINGLE_ROUNDS = 400
"""Rounds of which one value each is looked at."""
CHANCE = 1e-7
"""Probability with which one test of a law may fail by chance."""
DEVIATIONS = 7
"""The same in standard deviations, for sums of very many."""


# Sampling -----------------------------------------------------------------------------------------------------------


def samples(plan: Plan, seed: int) -> list[str]:
    """How often units take part, and how often in two rounds, against the probability that is accounted.

    Each round is lost once and runs again.
    """
    users = CanaryUsers(np.ones(plan.population, dtype=np.int64), np.zeros(plan.population))
    round = without_gradients(plan, users, 2, seed, seed + 1).round()
    population = min(plan.population, MOST_UNITS)
    watched = np.sort(np.random.default_rng(seed).choice(plan.population, size=population, replace=False))
    drawn, sizes, twice = [], [], False
    for number in range(SAMPLED_ROUNDS):
        for _ in range(2):
            units = round.units(number)
            twice |= len(np.unique(units)) != len(units)
            drawn.append(np.flatnonzero(np.isin(watched, units)))
            sizes.append(len(units))
            round.budget.charge(number)
    event = plan.step_event()
    capped = event if isinstance(event, TruncatedPoissonSubsampledGaussian) else None
    accounted = getattr(event, "sampling_probability", plan.normaliser / plan.population)
    probability = accounted if capped is None else _share_taken(capped)
    broken = []
    if twice:
        broken.append("a unit was sampled twice in one round")
    counts = np.bincount(np.concatenate(drawn), minlength=population)
    # Whatever the scheme, a unit is in a round with this probability; no scheme may pack a unit's rounds together.
    total, trials = int(counts.sum()), len(drawn) * population
    if _unlikely(total, trials, probability) or _unlikely(trials - total, trials, 1 - probability):
        broken.append(f"{total / len(drawn):.4g} units a round were sampled, not {probability * population:.4g}")
    if stats.binom.sf(counts.max() - 1, len(drawn), probability) * population < CHANCE:
        broken.append(f"a unit was in {counts.max()} of {len(drawn)} rounds at probability {probability:.3g}")
    if probability < 1 and _alike(drawn, population, probability):
        broken.append("two rounds had more units in common than by chance")
    if capped is not None:
        broken += _beside_the_cap(capped, np.array(sizes), counts)
    return broken


def _share_taken(event: TruncatedPoissonSubsampledGaussian) -> float:
    """The chance of each unit that an event with a cap stands for: E[min(X, B)]/N of X ~ Bin(N, q)."""
    n, q, cap = event.population_size, event.sampling_probability, event.most_units
    return float(q * stats.binom.cdf(cap - 2, n - 1, q) + cap / n * stats.binom.sf(cap - 1, n, q))


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
    full, share = int((sizes >= cap).sum()), float(stats.binom.sf(cap - 1, n, q))
    if _unlikely(full, len(sizes), share) or _unlikely(len(sizes) - full, len(sizes), 1 - share):
        broken.append(f"{full} of {len(sizes)} rounds were at their cap, at a probability of {share:.3g}")
    half = len(counts) // 2
    first, total, share = int(counts[:half].sum()), int(counts.sum()), half / len(counts)
    # Of a uniform subset fewer deviate than of independent ones.
    if _unlikely(first, total, share) or _unlikely(total - first, total, 1 - share):
        broken.append(f"{first} of {total} sampled units were of the first half of all")
    return broken


def _alike(drawn: list[np.ndarray], population: int, probability: float) -> bool:
    """Whether rounds share units: any two of them, or neighbours all together where there are few units."""
    sizes = np.array([len(units) for units in drawn])
    places = (np.repeat(np.arange(len(drawn)), sizes), np.concatenate(drawn))
    held = sparse.csr_array((np.ones(sizes.sum()), places), shape=(len(drawn), population))
    shared = (held @ held.T).toarray()
    first, second = np.triu_indices(len(drawn), 1)
    # Of one round's units each is in the other with the probability.
    chances = stats.binom.sf(shared[first, second] - 1, sizes[first], probability)
    if chances.min() * len(first) < CHANCE:
        return True
    for apart in (1, 2):
        for begin in (0, apart):  # pairs that have no round in common, so that they are independent
            left = np.arange(len(drawn) - apart)
            left = left[left // apart % 2 == begin // apart]
            if _unlikely(int(shared[left, left + apart].sum()), len(left) * population, probability**2):
                return True
    return False


def _unlikely(hits: int, trials: int, probability: float) -> bool:
    """Whether so many hits or more are less likely than CHANCE in independent trials."""
    return bool(stats.binom.sf(hits - 1, trials, min(probability, 1.0)) < CHANCE)


# Noise --------------------------------------------------------------------------------------------------------------


def noises(plan: Plan, seed: int) -> list[str]:
    """Rounds in which nobody is: what is released is the noise."""
    broken = _noises(plan, seed, seed + 1)
    if plan.mechanism.secure:
        broken += [f"{fault} (secure noise)" for fault in _noises(plan, seed, None)]
    return broken


def _noises(plan: Plan, seed: int, noise_seed: int | None) -> list[str]:
    draws = []
    rig, round = _nobody(plan, 1, NOISE_VALUES, seed, noise_seed)
    start = _warmed_up(rig, round)
    # Every round runs once more: one that was lost must not draw the same noise again.
    for place, number in enumerate([*range(WARM_UP, WARM_UP + ROUNDS)] * 2):
        draws.append(_whitened_noise(rig, round, start, place, number))
    broken = []
    if any(np.count_nonzero(draw) < 0.99 * len(draw) for draw in draws):
        broken.append("some values got no noise")
        return broken
    between = np.abs(np.corrcoef(draws)[np.triu_indices(len(draws), 1)])
    if not between.max() <= DEVIATIONS / np.sqrt(NOISE_VALUES):  # nor nan, of values that are all the same
        broken.append("the noise of one sum shows in that of another")
    law = _law(plan, round.release.noise)
    if isinstance(round.release.noise, GaussianNoise):  # other laws may share a scale among the values of one sum
        begin = 0
        for size in rig.sizes.values():
            parts = [draw[begin : begin + size] for draw in draws]
            # All together say it most sharply; one alone may be the only one that is wrong.
            faults = [_of_another_law(part, law, "noise") for part in (np.concatenate(parts), *parts)]
            broken += next(filter(None, faults), [])
            begin += size
    elif law is not None:
        rig, round = _nobody(plan, 1, 2, seed, noise_seed)
        start = _warmed_up(rig, round)
        numbers = range(WARM_UP, WARM_UP + SINGLE_ROUNDS)
        ones = [_whitened_noise(rig, round, start, number, number)[0] for number in numbers]
        broken += _of_another_law(np.array(ones), law, "noise")
    return broken


def _nobody(plan: Plan, users: int, size: int, seed: int, noise_seed: int | None) -> tuple[Rig, OnlyRound]:
    """Rounds of so many users' plan, of which none is there."""
    sampled = CanaryUsers(np.ones(users, dtype=np.int64), np.zeros(users))
    alone = dataclasses.replace(plan, sampling_probability=1.0).on(sampled)
    rig = without_gradients(alone, sampled, size, seed, noise_seed)
    return rig, rig.round(np.empty(0, dtype=np.int64))


def _warmed_up(rig: Rig, round: OnlyRound) -> dict[str, np.ndarray]:
    """The state after some rounds, in which scales that follow releases have moved."""
    for number in range(WARM_UP):
        rig.seen(round, number)
    state = state_of(round)
    return state | {PARAMETERS: 0 * state[PARAMETERS]}


def _whitened_noise(rig: Rig, round: OnlyRound, start: dict[str, np.ndarray], place: int, number: int) -> np.ndarray:
    """The noise of a round over its clip norm and scales. The norm is another one in each place, as it may move."""
    moved = start[RELEASE + CLIP_NORM] * 4.0 ** (place % 3 - 1)
    round.load_state(start | {RELEASE + CLIP_NORM: moved})
    clip = round.release.clip
    scales = np.repeat([clip.scales.get(name, 1.0) for name in rig.sizes], list(rig.sizes.values()))
    return rig.seen(round, number).sum / (clip.norm * scales)


Law = Callable[[np.ndarray], np.ndarray]
"""A distribution function."""


def law_known(plan: Plan) -> bool:
    """Whether the audit knows the law of the plan's noise, from the event that is accounted."""
    noise = plan.mechanism.noise(plan.step_event(), plan.sum_noise_multiplier, sizes_of(NOISE_VALUES))
    return _law(plan, noise) is not None


def _law(plan: Plan, noise: Noise) -> Law | None:
    """The law of one value of the noise, over clip norm and scale, that the accounted event has; None: not known."""
    event = plan.step_event()
    if isinstance(event, RandomisedScaleLaplace):
        # Pr[X > x] = M(−x)/2 for the moment generating function M of the inverse scale.
        return lambda x: np.where(x < 0, 0.0, 1.0) - np.sign(x) * np.exp(log_mgf(event.law, -np.abs(x))) / 2
    sigma, rule = getattr(event, "noise_multiplier", None), plan.clip_rule
    if sigma is None or not isinstance(noise, GaussianNoise):
        return None
    # A count of deviation σ_b takes (2σ_b)⁻² of σ⁻².
    left = sigma**-2 if rule is None else sigma**-2 - (2 * rule.count_std) ** -2
    normal: Law = stats.norm(scale=left**-0.5).cdf
    return normal


def _of_another_law(values: np.ndarray, law: Law | None, what: str) -> list[str]:
    """Independent values that are not of the law."""
    if law is None:
        return []
    normal = stats.norm.ppf(law(values))
    energy = np.mean(normal**2)
    if not abs(energy - 1) <= DEVIATIONS * np.sqrt(2 / len(normal)):
        return [f"{what} has {np.sqrt(energy):.3g} of the standard deviation that is accounted"]
    if stats.kstest(normal, "norm").pvalue < CHANCE:
        return [f"{what} is not of the law that is accounted"]
    return []


# Counts -------------------------------------------------------------------------------------------------------------


def counts(plan: Plan, seed: int) -> list[str]:
    """The noised count of units below the clip norm, as the next clip norm shows it.

    Among so many users that the count's noise never reaches the ends at which the norm stops following.
    """
    rule = plan.clip_rule
    assert rule is not None
    group = min(plan.group_size, MOST_ROWS)
    users = max(64, round(40 * rule.count_std))
    tokens = np.zeros(users * group)
    tokens[:group] = 1
    updates = np.zeros((2, 2), dtype=np.float32)
    updates[1] = FAR * plan.clip_norm
    owners = CanaryUsers(np.full(users, group), tokens)
    examined = dataclasses.replace(plan, group_size=group, sampling_probability=1.0).on(owners)
    each = examined.units_per_user(group)
    broken: list[str] = []
    for noise_seed in (seed + 1, None):
        rig = Rig(examined, owners, updates, sampling_seed=seed, noise_seed=noise_seed)
        nobody = rig.round(np.empty(0, dtype=np.int64))
        start = state_of(nobody)
        found, sums = [], []
        for number in range(SINGLE_ROUNDS):
            nobody.load_state(start)
            seen = rig.seen(nobody, number)
            found.append(_count(examined, seen.clip_norm))
            sums.append(seen.sum[0])
        broken += _of_another_law(np.array(found), stats.norm(scale=rule.count_std).cdf, "the count's noise")
        if np.ptp(found) and abs(np.corrcoef(found, sums)[0, 1]) > DEVIATIONS / np.sqrt(len(found)):
            broken.append("the noise of the count shows in that of the sum")
        if noise_seed is None:
            continue
        for user in (0, 1):  # far beyond the clip, and within
            there = rig.round(np.arange(each) + user * each)
            there.load_state(start)
            moved = abs(_count(examined, rig.seen(there, 0).clip_norm) - found[0])
            if not moved <= each / 2 + 1e-6:
                broken.append(f"a user of {each} units moved the count by {moved:.3g}, not by {each / 2:.3g}")
    return broken


def _count(plan: Plan, clip_norm: float) -> float:
    """Units below less half of all units, with noise, as the clip norm after a round shows it."""
    rule = plan.clip_rule
    assert rule is not None
    fraction = rule.quantile - np.log(clip_norm / plan.clip_norm) / rule.learning_rate
    return float((fraction - 0.5) * rule.expected_units)
