"""Error rates of an attack, with confidence, from its scores on data sets with and without the canary."""

from dataclasses import dataclass

import numpy as np
import scipy

from fedsim.errors import InvalidInput
from fedsim.validation import require_between

CHOOSING = 0.25
"""Share of the trials that choose the threshold; the others measure it, so that the choice costs no confidence."""
CANDIDATES = 64


@dataclass(frozen=True, kw_only=True)
class AttackRates:
    """An attack that says "in" above a threshold; both bounds hold together with the confidence.

    Attributes:
        true_positive: Lower bound on Pr["in" | in].
        false_positive: Upper bound on Pr["in" | out].
        threshold: The threshold.
        trials: How many trials measured the rates (in, out).
        confidence: Of both bounds together.
    """

    true_positive: float
    false_positive: float
    threshold: float
    trials: tuple[int, int]
    confidence: float


def clopper_pearson(hits: int, trials: int, confidence: float) -> tuple[float, float]:
    """One-sided bounds (lower, upper) on a probability, each of the given confidence (Clopper and Pearson 1934)."""
    lower = 0.0 if hits == 0 else float(scipy.stats.beta.ppf(1 - confidence, hits, trials - hits + 1))
    upper = 1.0 if hits == trials else float(scipy.stats.beta.ppf(confidence, hits + 1, trials - hits))
    return lower, upper


def attack_rates(scores_in: np.ndarray, scores_out: np.ndarray, *, confidence: float = 0.95) -> AttackRates:
    """Rates of the best threshold attack.

    The first quarter of the trials of each kind chooses the threshold (the one whose Gaussian separation is best
    supported), the rest measure it.

    Args:
        scores_in: Scores of trials with the canary, float [n]; larger means more likely in.
        scores_out: Scores of trials without, float [m].
        confidence: Of both rates together.

    Raises:
        InvalidInput: With fewer than 8 trials of a kind, or scores that are nan.
    """
    require_between("confidence", confidence, 0, 1)
    scores_in, scores_out = np.asarray(scores_in, dtype=np.float64), np.asarray(scores_out, dtype=np.float64)
    if min(len(scores_in), len(scores_out)) < 8 or np.isnan(scores_in).any() or np.isnan(scores_out).any():
        raise InvalidInput("scores", f"{len(scores_in)} in, {len(scores_out)} out", "at least 8 numbers of each kind")
    first_in, first_out = int(CHOOSING * len(scores_in)), int(CHOOSING * len(scores_out))
    each = 1 - (1 - confidence) / 2
    threshold = _best_threshold(scores_in[:first_in], scores_out[:first_out], each)
    rest_in, rest_out = scores_in[first_in:], scores_out[first_out:]
    return AttackRates(
        true_positive=clopper_pearson(int((rest_in > threshold).sum()), len(rest_in), each)[0],
        false_positive=clopper_pearson(int((rest_out > threshold).sum()), len(rest_out), each)[1],
        threshold=threshold,
        trials=(len(rest_in), len(rest_out)),
        confidence=confidence,
    )


def _best_threshold(scores_in: np.ndarray, scores_out: np.ndarray, confidence: float) -> float:
    pooled = np.unique(np.concatenate([scores_in, scores_out]))
    places = np.unique(np.linspace(0, len(pooled) - 1, CANDIDATES).astype(int))

    def separation(threshold: float) -> float:
        hit = clopper_pearson(int((scores_in > threshold).sum()), len(scores_in), confidence)[0]
        false = clopper_pearson(int((scores_out > threshold).sum()), len(scores_out), confidence)[1]
        return float(scipy.stats.norm.ppf(hit) - scipy.stats.norm.ppf(false))

    # Between two scores rather than on one, so that a gap between the two kinds is used.
    middles = (pooled[:-1] + pooled[1:]) / 2 if len(pooled) > 1 else pooled
    middles = middles[np.minimum(places, len(middles) - 1)]
    return float(max(middles, key=separation))
