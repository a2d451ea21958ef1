"""User inference: how well scores tell users of the training set from others."""

import math
from dataclasses import dataclass

import numpy as np
import scipy

from fedsim.errors import InvalidInput
from fedsim.privacy.audit.rates import clopper_pearson
from fedsim.validation import require_between

FEW_FALSE = 0.01
"""The false positive rate at which attacks are compared (Carlini et al. 2022)."""


@dataclass(frozen=True, kw_only=True)
class AttackArea:
    """Area under the receiver operating characteristic, with a two-sided confidence interval.

    Attributes:
        area: Pr[a member's score exceeds a non-member's] + ½ Pr[equal]; 0.5 is guessing.
        lower: Lower end of the interval.
        upper: Upper end.
        confidence: Of the interval.
    """

    area: float
    lower: float
    upper: float
    confidence: float


def attack_area(scores_in: np.ndarray, scores_out: np.ndarray, *, confidence: float = 0.95) -> AttackArea:
    """AUC of scores as an attack, with the interval of DeLong, DeLong and Clarke-Pearson 1988.

    Args:
        scores_in: Scores of members, float [n].
        scores_out: Scores of non-members, float [m].
        confidence: Of the interval.

    Raises:
        InvalidInput: With fewer than two scores of a kind.
    """
    n, m = len(scores_in), len(scores_out)
    if min(n, m) < 2:
        raise InvalidInput("scores", f"{n} in, {m} out", "at least 2 numbers of each kind")
    ranks = scipy.stats.rankdata(np.concatenate([scores_in, scores_out]))
    inside = (ranks[:n] - scipy.stats.rankdata(scores_in)) / m
    outside = 1 - (ranks[n:] - scipy.stats.rankdata(scores_out)) / n
    area = float(inside.mean())
    error = math.sqrt(inside.var(ddof=1) / n + outside.var(ddof=1) / m)
    half = float(scipy.stats.norm.ppf((1 + confidence) / 2)) * error
    return AttackArea(area=area, lower=max(0.0, area - half), upper=min(1.0, area + half), confidence=confidence)


@dataclass(frozen=True, kw_only=True)
class TruePositives:
    """How many members an attack finds while it accuses few others, with a two-sided confidence interval.

    Attributes:
        rate: Share of members above the threshold; an attack that guesses has false_positive.
        lower: Lower end of the interval.
        upper: Upper end.
        false_positive: Share of non-members above it.
        confidence: Of the interval.
    """

    rate: float
    lower: float
    upper: float
    false_positive: float
    confidence: float

    def in_words(self) -> str:
        """A phrase."""
        interval = f"{100 * self.lower:.1f} to {100 * self.upper:.1f}"
        return f"{self.rate:.1%} true positives at {self.false_positive:.0%} false ones ({interval})"


def true_positives(
    scores_in: np.ndarray, scores_out: np.ndarray, *, false_positive: float = FEW_FALSE, confidence: float = 0.95
) -> TruePositives:
    """Share of members above the threshold that a given share of non-members exceeds.

    The interval holds whatever the law of scores that are drawn independently. Half of what it may be wrong is for
    the threshold, which lies between two order statistics of the non-members' scores (their number above it is
    binomial), half for the members above it (Clopper and Pearson 1934).

    Args:
        scores_in: Scores of members, float [n]; larger means more likely in.
        scores_out: Scores of non-members, float [m].
        false_positive: Share of non-members above the threshold, between 0 and 1.
        confidence: Of the interval.

    Raises:
        InvalidInput: With fewer than two scores of a kind, or a rate or confidence out of range.
    """
    n, m = len(scores_in), len(scores_out)
    if min(n, m) < 2:
        raise InvalidInput("scores", f"{n} in, {m} out", "at least 2 numbers of each kind")
    require_between("false_positive", false_positive, 0, 1)
    require_between("confidence", confidence, 0, 1)
    falling = np.sort(np.asarray(scores_out, dtype=np.float64))[::-1]
    at_least, at_most = scipy.stats.binom.interval((1 + confidence) / 2, m, false_positive)
    each = 1 - (1 - confidence) / 4

    def above(exceeding: int) -> int:
        """Members above the threshold that so many non-members exceed."""
        return int((scores_in > falling[exceeding]).sum()) if exceeding < m else n

    # Of a non-members' score that is above the threshold itself nothing is known but that.
    lower = clopper_pearson(above(int(at_least) - 1), n, each)[0] if at_least >= 1 else 0.0
    upper = clopper_pearson(above(int(at_most)), n, each)[1]
    rate = above(math.floor(false_positive * m)) / n
    return TruePositives(rate=rate, lower=lower, upper=upper, false_positive=false_positive, confidence=confidence)
