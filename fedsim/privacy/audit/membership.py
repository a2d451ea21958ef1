"""User inference: how well scores tell users of the training set from others."""

import math
from dataclasses import dataclass

import numpy as np
import scipy

from fedsim.errors import InvalidInput


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
