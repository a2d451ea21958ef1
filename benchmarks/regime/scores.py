"""The planner scored as a predictor: does what it ranks first do best?"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy

from benchmarks.regime.outcomes import Results, Setting

FEWEST = 3
"""Settings of which an order can be right or wrong."""
TIE = 1e-9
"""Relative difference of two predictions below which neither is ahead."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well settings at one ε and total of gradient evaluations were ranked.

    Attributes:
        settings: What was ranked: of one corpus, both algorithms.
        rank: Spearman's correlation between what was predicted and what came out: 1 where the order is right.
        first: The setting that was ranked first; several where they are predicted the same. With single examples ULS
            and ELS have the same noise, and that ULS draws a user's example anew each time is not predicted.
        best: The one that did best.
        regret: Mean loss of what was ranked first, less that of the best, nats.
        chance: The same of a setting taken at random.
    """

    settings: tuple[Setting, ...]
    rank: float
    first: tuple[Setting, ...]
    best: Setting
    regret: float
    chance: float


def scored(results: Results, worth: Callable[[Setting], float]) -> Iterator[Score]:
    """The scores of a predictor, wherever as many as FEWEST settings had the same ε and, nearly, the same compute.

    Args:
        results: Of the study.
        worth: What is predicted of a setting: the larger, the better.
    """
    groups: dict[tuple[str, float, int], list[Setting]] = {}
    for one in results.settings:
        groups.setdefault((one.corpus, one.epsilon, _compute(one)), []).append(one)
    for key in sorted(groups):
        if len(settings := groups[key]) >= FEWEST:
            yield score(settings, worth)


def score(settings: list[Setting], worth: Callable[[Setting], float]) -> Score:
    """How well these settings are ranked."""
    losses = np.array([one.loss for one in settings])
    predicted = np.array([worth(one) for one in settings])
    first = np.flatnonzero(np.isclose(predicted, predicted.max(), rtol=TIE, atol=0))
    return Score(
        settings=tuple(settings),
        rank=float(scipy.stats.spearmanr(predicted, -losses).statistic),
        first=tuple(settings[place] for place in first),
        best=settings[int(losses.argmin())],
        regret=float(losses[first].mean() - losses.min()),
        chance=float(losses.mean() - losses.min()),
    )


def _compute(one: Setting) -> int:
    """Half-octaves of gradient evaluations in all: the same for splits of one total that were rounded."""
    return round(2 * math.log2(one.place.gradients * one.place.rounds))
