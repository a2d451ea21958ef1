"""How likely each canary of one run was in it, from what the run's rounds show of each."""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import scipy

from experiments.audit.chains import by_turns, over_turns, strength
from fedsim.plan import Plan


def log_odds(plan: Plan, turn: np.ndarray, units: int, rows: Iterable[np.ndarray]) -> np.ndarray:
    """log Pr[what was seen | in] − log Pr[… | out] of each canary, for Gaussian noise, float64 [m].

    With other noise, and where rounds are not drawn independently (random allocation, a cap), it is a score like
    others: larger means more likely in.

    Args:
        plan: The plan.
        turn: The first round in which each canary may take part, int [m].
        units: Units of a canary, each sampled by itself.
        rows: Each round's whitened sum along each canary's update, float64 [m]: how many of its units took part, in
            units of the clip, and noise.
    """
    correlation = plan.correlation
    c = np.ones(1) if correlation is None else np.asarray(correlation.coefficients_of(plan.steps))
    probability = probability_in_turn(plan)
    seen = _seen_in_all if probability == 1 else _seen_in_turns
    taken = np.arange(units + 1)
    chances = scipy.stats.binom.logpmf(taken, units, probability)
    precision = (plan.sum_noise_multiplier * strength(plan)) ** -2
    total = np.zeros(len(turn))
    for match, energy in seen(c, plan.scheme.separation, plan.steps, turn, rows):
        terms = [
            chance + precision * (k * match - k**2 / 2 * energy)
            for k, chance in zip(taken, chances, strict=True)
            if chance > -np.inf
        ]
        total += np.logaddexp.reduce(terms)
    return total


def probability_in_turn(plan: Plan) -> float:
    """With which probability a unit is in a round of its turn, by what is accounted, or else by the normaliser."""
    if not plan.scheme.amplifies:
        return 1.0
    in_any = plan.normaliser / plan.population * plan.scheme.separation
    return min(1.0, float(getattr(plan.step_event(), "sampling_probability", in_any)))


Matches = Iterator[tuple[np.ndarray, np.ndarray]]
"""What was seen of each canary's rounds that are decided together: the match of the rows that its unit would have
moved with how it would have moved them, and that movement's square, float64 [m] each."""


def _seen_in_all(c: np.ndarray, apart: int, rounds: int, turn: np.ndarray, rows: Iterable[np.ndarray]) -> Matches:
    """Of canaries that are in every round of their turn: all rows at once, whether rounds share rows or not."""
    energy = np.append(0.0, np.cumsum(by_turns(c, apart, rounds) ** 2))
    yield over_turns(c, apart, rounds, turn, rows), energy[np.maximum(rounds - turn, 0)]


def _seen_in_turns(c: np.ndarray, apart: int, rounds: int, turn: np.ndarray, rows: Iterable[np.ndarray]) -> Matches:
    """Of canaries whose part in each round of their turn is drawn anew: turn by turn, which share no row."""
    c = np.append(c, np.zeros(apart))[:apart]
    match, energy = np.zeros(len(turn)), np.zeros(len(turn))
    kept: deque[np.ndarray] = deque(maxlen=apart)
    for number, row in enumerate(rows):
        kept.appendleft(row)
        mixed = sum(coefficient * earlier for coefficient, earlier in zip(c, kept, strict=False))
        since = number - turn
        moved = np.where(since >= 0, c[since % apart], 0.0)
        match += moved * mixed
        energy += moved**2
        done = since % apart == apart - 1 if number < rounds - 1 else np.ones(len(turn), dtype=bool)
        if done.any():
            yield np.where(done, match, 0.0), np.where(done, energy, 0.0)
            match[done], energy[done] = 0.0, 0.0
