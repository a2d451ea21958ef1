"""Each algorithm at its best: group size, clip norm and learning rate of least closed-form error."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from experiments.mean_estimation.error import Population, mean_squared_error
from fedsim.plan import Plan

LEARNING_RATES = np.geomspace(0.01, 1.0, 81)
CLIP_NORMS = np.geomspace(0.3, 3.0, 12)
"""Clip norms to choose from, in units of the typical norm of what is clipped."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A plan with its clip norm and the learning rate, and the error they should have.

    Attributes:
        plan: Sampling, clip and noise.
        learning_rate: η.
        error: Closed-form E‖θ_T − μ‖².
    """

    plan: Plan
    learning_rate: float
    error: float


def tuned(population: Population, plans: Sequence[Plan]) -> Setting:
    """The best of these plans with its best clip norm and learning rate.

    The choice uses the truth about the population, as a study may; on private data it would cost privacy.
    """
    return min((_tuned(population, plan) for plan in plans), key=lambda setting: setting.error)


def _tuned(population: Population, plan: Plan) -> Setting:
    typical = population.unit_norm(plan.rows_per_unit(population.examples_per_user))
    candidates = []
    for factor in CLIP_NORMS:
        clipped = replace(plan, clip_norm=float(factor * typical))
        errors = mean_squared_error(population, clipped, LEARNING_RATES)
        best = int(np.argmin(errors))
        candidates.append(Setting(plan=clipped, learning_rate=float(LEARNING_RATES[best]), error=float(errors[best])))
    return min(candidates, key=lambda setting: setting.error)
