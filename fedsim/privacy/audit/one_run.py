"""Audits of a single run with many canaries, each in or out by its own fair coin.

The auditor guesses coins from the run's output and may abstain. Correct guesses beyond what a guarantee permits
contradict it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy

from fedsim.errors import InvalidInput
from fedsim.privacy.tradeoff import PrivacyCurve
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


def guess_by_odds(log_odds: np.ndarray, coins: np.ndarray, made: int) -> Guesses:
    """Guess the coins of which the log odds say most, each way that they say; abstain on the others.

    Args:
        log_odds: float [m]; above 0 means rather in, below rather out.
        coins: bool [m]; what is to be guessed.
        made: How many guesses to make; must not depend on the coins.
    """
    surest = np.argsort(-np.abs(log_odds), kind="stable")[:made]
    return Guesses(canaries=len(coins), made=made, correct=int((coins[surest] == (log_odds[surest] > 0)).sum()))


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


def one_run_permits(guesses: Guesses, curve: PrivacyCurve, *, confidence: float = 0.95) -> bool:
    """Whether so many right guesses are possible, more than one time in 1/(1 − confidence), under a guarantee.

    Mahloujifar, Melis and Chaudhuri 2024, "Auditing f-Differential Privacy in One Run": let p_i be the probability of
    exactly i right guesses of r, each of m coins as likely guessed. A step down from i right guesses to i − 1 is a
    test of the coin that was guessed right, and the trade-off function bounds how fast the probability may fall. If
    all the mass needed exceeds r/m, it was impossible. No independence of the canaries is needed.

    Args:
        guesses: How the auditor did.
        curve: The guarantee; its trade-off function is a lower bound, which errs towards "possible".
        confidence: Of the answer "no".
    """
    require_between("confidence", confidence, 0, 1)
    r, v, level = guesses.made, guesses.correct, 1 - confidence
    total = r / guesses.canaries
    right, wrong = level * total * v / r, level * total * (r - v) / r
    for i in range(v - 1, -1, -1):
        grown = max(wrong, curve.least_type_one(min(right, 1.0)))
        right += i / (r - i) * (grown - wrong)
        wrong = grown
        if right + wrong > total:
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
