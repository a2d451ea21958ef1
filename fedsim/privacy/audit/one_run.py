"""Audits of a single run with many canaries, each in or out by its own fair coin.

The auditor guesses coins from the run's output and may abstain. Correct guesses beyond what a guarantee permits
contradict it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy

from fedsim.errors import InvalidInput
from fedsim.privacy.gaussian_curve import gaussian_epsilon
from fedsim.validation import require_between


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """How the auditor did.

    Attributes:
        canaries: Coins flipped, m.
        made: Guesses made, r ≤ m.
        correct: Of those, right, v.
    """

    canaries: int
    made: int
    correct: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.made <= self.canaries or self.made == 0:
            raise InvalidInput(
                "guesses", (self.correct, self.made, self.canaries), "correct ≤ made ≤ canaries, made > 0"
            )


def guess(scores: np.ndarray, coins: np.ndarray, made: int) -> Guesses:
    """Guess "in" for the highest scores and "out" for the lowest, half of `made` each; abstain in between.

    Args:
        scores: float [m]; larger means more likely in.
        coins: bool [m]; what is to be guessed.
        made: How many guesses to make; must not depend on the coins.
    """
    order = np.argsort(scores, kind="stable")
    half = made // 2
    right = int((~coins[order[:half]]).sum() + coins[order[len(order) - (made - half) :]].sum())
    return Guesses(canaries=len(scores), made=made, correct=right)


def one_run_p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Upper bound on the probability of so many correct guesses under (ε, δ)-DP.

    Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run", Theorem 5.2: the number of correct
    guesses is dominated by a Binomial(r, e^ε/(1+e^ε)), up to a δ term that the maximum below bounds.
    """
    r, v, m = guesses.made, guesses.correct, guesses.canaries
    right = float(1 / (1 + np.exp(-epsilon)))
    tail = float(scipy.stats.binom.sf(v - 1, r, right))
    if delta == 0 or v == 0:
        return min(1.0, tail)
    # Pr[v − i ≤ W < v] / i, largest over i.
    below = np.cumsum(scipy.stats.binom.pmf(np.arange(v - 1, -1, -1), r, right))
    steepest = float((below / np.arange(1, v + 1)).max())
    return min(1.0, tail + 2 * m * delta * steepest)


def one_run_epsilon(guesses: Guesses, delta: float, *, confidence: float = 0.95) -> float:
    """The largest ε that the guesses rule out at delta: a lower bound with the given confidence, for any mechanism."""
    require_between("confidence", confidence, 0, 1)
    return _largest(lambda epsilon: one_run_p_value(guesses, epsilon, delta) <= 1 - confidence, 50.0)


def one_run_gaussian_shift(guesses: Guesses, *, confidence: float = 0.95) -> float:
    """The largest μ that the guesses rule out, for a mechanism that is μ-Gaussian-DP or not.

    Mahloujifar, Melis and Chaudhuri 2024, "Auditing f-Differential Privacy in One Run": along the number of correct
    guesses, the trade-off function bounds how probability may pile up.
    """
    require_between("confidence", confidence, 0, 1)
    return _largest(lambda mu: mu > 0 and not _possible(guesses, mu, 1 - confidence), 50.0)


def one_run_gaussian_epsilon(guesses: Guesses, delta: float, *, confidence: float = 0.95) -> float:
    """ε at delta of the μ of one_run_gaussian_shift: a lower bound for mechanisms with a Gaussian trade-off."""
    mu = one_run_gaussian_shift(guesses, confidence=confidence)
    return gaussian_epsilon(mu, delta).lower if mu > 0 else 0.0


def _possible(guesses: Guesses, mu: float, level: float) -> bool:
    """Whether Pr[at least `correct` of `made`] ≥ level is possible under μ-Gaussian-DP.

    With p_i = Pr[exactly i correct], the i-th step bounds the mass of correct guesses below it by the trade-off
    function of what lies above; if all the mass needed exceeds made/canaries, it was impossible.
    """
    r, v = guesses.made, guesses.correct
    total = r / guesses.canaries
    heavy, light = level * total * v / r, level * total * (r - v) / r
    for i in range(v - 1, -1, -1):
        grown = max(light, float(scipy.stats.norm.cdf(scipy.stats.norm.ppf(min(heavy, 1.0)) - mu)))
        heavy += i / (r - i) * (grown - light)
        light = grown
        if heavy + light > total:
            return False
    return True


def _largest(ruled_out: Callable[[float], bool], most: float) -> float:
    """The largest value below which everything is ruled out, from below, to 1e-4."""
    low, high = 0.0, 1.0
    if not ruled_out(1e-6):
        return 0.0
    while ruled_out(high):
        low, high = high, 2 * high
        if high > most:
            return most
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if ruled_out(middle) else (low, middle)
    return low
