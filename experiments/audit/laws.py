"""Whether noise and counts are of the laws that are accounted.

Each test fails by chance less than once in ten million.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy

from experiments.audit.canaries import CanaryUsers, sizes_of
from experiments.audit.chains import fresh, independent, strength
from experiments.audit.contributions import MOST_ROWS, ROUNDS
from experiments.audit.rig import FAR, WARM_UP, OnlyRound, Rig, state_of, without_gradients
from experiments.audit.samples import CHANCE
from experiments.audit.turns import in_every_turn, turns
from fedsim.plan import Plan
from fedsim.privacy.mechanisms import GaussianNoise, Noise
from fedsim.privacy.mechanisms.laplace.event import RandomisedScaleLaplace
from fedsim.privacy.mechanisms.laplace.inverse_scale import log_mgf
from fedsim.release import CLIP_NORM
from server.round import PARAMETERS, RELEASE

NOISE_VALUES = 4096
SINGLE_ROUNDS = 400
"""Rounds of which one value each is looked at."""
DEVIATIONS = 7
"""CHANCE in standard deviations, for sums of very many."""


# Noise --------------------------------------------------------------------------------------------------------------


def noises(plan: Plan, seed: int) -> list[str]:
    """Rounds in which nobody is: what is released is the noise."""
    broken = _noises(plan, seed, seed + 1)
    if plan.mechanism.secure and not plan.noise_buffers:
        broken += [f"{fault} (secure noise)" for fault in _noises(plan, seed, None)]
    return broken


def _noises(plan: Plan, seed: int, noise_seed: int | None) -> list[str]:
    rig, round = nobody(plan, 1, NOISE_VALUES, seed, noise_seed)
    broken: list[str] = []
    draws = _of_chains(rig, round, broken) if plan.correlation is not None else _of_rounds(rig, round)
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
            chance = CHANCE * min(1.0, 2 * ROUNDS / len(parts))
            faults = [_of_another_law(part, law, "noise", chance) for part in (np.concatenate(parts), *parts)]
            broken += next(filter(None, faults), [])
            begin += size
    elif law is not None:
        rig, round = nobody(plan, 1, 2, seed, noise_seed)
        start = _warmed_up(rig, round)
        numbers = range(WARM_UP, WARM_UP + SINGLE_ROUNDS)
        ones = [_whitened_noise(rig, round, start, number, number)[0] for number in numbers]
        broken += _of_another_law(np.array(ones), law, "noise")
    return broken


def _of_rounds(rig: Rig, round: OnlyRound) -> list[np.ndarray]:
    """Whitened noise of rounds that each run twice: one that was lost must not draw the same noise again."""
    start = _warmed_up(rig, round)
    numbers = [*range(WARM_UP, WARM_UP + ROUNDS)] * 2
    return [_whitened_noise(rig, round, start, place, number) for place, number in enumerate(numbers)]


def _of_chains(rig: Rig, round: OnlyRound, broken: list[str]) -> list[np.ndarray]:
    """What is fresh in the noise of two chains of rounds, each of which is resumed from its state halfway."""
    nobody = np.empty(0, dtype=np.int64)
    correlation, draws, rounds = rig.plan.correlation, [], ROUNDS + 2 * rig.plan.bands
    assert correlation is not None
    c = correlation.coefficients_of(rounds)
    for chain in range(2):
        released = [_next_noise(rig, round, number) for number in range(rounds // 2)]
        state = state_of(round)
        round = rig.round(nobody, round.budget.ledger)
        round.load_state(state)
        released += [_next_noise(rig, round, number) for number in range(rounds // 2, rounds)]
        draws += list(fresh(c, np.array(released)) / strength(rig.plan))
        if chain == 0 and round.seeds.noise is not None:
            whole = rig.round(nobody)
            if not np.array_equal(released, [_next_noise(rig, whole, number) for number in range(rounds)]):
                broken.append("a chain of noise that was resumed did not go on as one that was not")
    return draws


def _next_noise(rig: Rig, round: OnlyRound, number: int) -> np.ndarray:
    """The whitened noise of a chain's next round, at a clip norm of its own."""
    round.release.clip_norm = rig.plan.clip_norm * 4.0 ** (number % 3 - 1)
    round.parameters[:] = 0  # which leaves float32 nothing to round but the noise
    each = rig.units_of_noise(round)
    noise: np.ndarray = rig.seen(round, number).sum / each
    return noise


def nobody(plan: Plan, users: int, size: int, seed: int, noise_seed: int | None) -> tuple[Rig, OnlyRound]:
    """Rounds of so many users' plan, of which none is there."""
    sampled = CanaryUsers(np.ones(users, dtype=np.int64), np.zeros(users))
    alone = dataclasses.replace(plan, sampling_probability=in_every_turn(plan)).on(sampled)
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
    each = rig.units_of_noise(round)
    noise: np.ndarray = rig.seen(round, number).sum / each
    return noise


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
    normal: Law = scipy.stats.norm(scale=left**-0.5).cdf
    return normal


def _of_another_law(values: np.ndarray, law: Law | None, what: str, chance: float = CHANCE) -> list[str]:
    """Independent values that are not of the law, where that is less likely than the chance."""
    if law is None:
        return []
    normal = scipy.stats.norm.ppf(law(values))
    energy = np.mean(normal**2)
    if not abs(energy - 1) <= DEVIATIONS * np.sqrt(2 / len(normal)):
        return [f"{what} has {np.sqrt(energy):.3g} of the standard deviation that is accounted"]
    if scipy.stats.kstest(normal, "norm").pvalue < chance:
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
    users = max(64, round(40 * rule.count_std)) * plan.scheme.separation
    tokens = np.zeros(users * group)
    tokens[:group] = 1
    updates = np.zeros((2, 2), dtype=np.float32)
    updates[1] = FAR * plan.clip_norm
    owners = CanaryUsers(np.full(users, group), tokens)
    # Whatever the sum's noise is correlated with, the count's is not: rounds may be looked at one by one.
    alone = dataclasses.replace(independent(plan), sampling_probability=in_every_turn(plan))
    examined = dataclasses.replace(alone, group_size=group).on(owners)
    turn = turns(examined, owners, seed)
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
        broken += _of_another_law(np.array(found), scipy.stats.norm(scale=rule.count_std).cdf, "the count's noise")
        if np.ptp(found) and abs(np.corrcoef(found, sums)[0, 1]) > DEVIATIONS / np.sqrt(len(found)):
            broken.append("the noise of the count shows in that of the sum")
        if noise_seed is None:
            continue
        for user in (0, 1):  # far beyond the clip, and within
            there, without = rig.round(np.arange(each) + user * each), rig.round(np.empty(0, dtype=np.int64))
            norms = []
            for one in (there, without):
                one.load_state(start)
                norms.append(rig.seen(one, int(turn[user])).clip_norm)
            moved = abs(_count(examined, norms[0]) - _count(examined, norms[1]))
            if not moved <= each / 2 + 1e-6:
                broken.append(f"a user of {each} units moved the count by {moved:.3g}, not by {each / 2:.3g}")
    return broken


def _count(plan: Plan, clip_norm: float) -> float:
    """Units below less half of all units, with noise, as the clip norm after a round shows it."""
    rule = plan.clip_rule
    assert rule is not None
    fraction = rule.quantile - np.log(clip_norm / plan.clip_norm) / rule.learning_rate
    return float((fraction - 0.5) * rule.expected_units)
