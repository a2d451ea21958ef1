"""The closed-form error of private mean estimation by ULS and ELS.

Examples are x_{u,i} = μ + a·ξ_u + b·ζ_{u,i} in d dimensions, ξ and ζ Gaussian with expected squared norm 1, and
a² + b² = 1. The loss ½‖θ − x‖² is ½‖θ‖² − ⟨θ, x⟩ and a constant; its first term holds no data, so the server steps on
it exactly (weight decay), and only the second goes through clipping, sampling and noise:

    θ ← θ − η·(θ − release),    release = (Σ clip(unit) + N(0, σ²C²I)) / normaliser,

with units, sampling, noise and normaliser from a plan of either algorithm. That keeps the iteration linear in the
releases, which is why its error, clipping included, has a closed form.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy

from experiments.mean_estimation.moments import clipped_product, clipped_square, shrinkage
from fedsim.plan import Plan
from fedsim.validation import require_at_least, require_positive


@dataclass(frozen=True, kw_only=True)
class Population:
    """Users and how alike their examples are.

    Attributes:
        num_users: N.
        examples_per_user: n; every user owns as many.
        dimension: d.
        mean_norm: ‖μ‖, the distance of the truth from where estimation starts.
        diversity: b²/(a² + b²): 0 when all examples of a user are the same, 1 when they differ as much as those of
            different users.
    """

    num_users: int = 500
    examples_per_user: int = 16
    dimension: int = 8
    mean_norm: float = 0.25
    diversity: float = 0.75

    def __post_init__(self) -> None:
        for name in ("num_users", "examples_per_user"):
            require_at_least(f"population.{name.replace('_', '-')}", getattr(self, name), 1)
        require_at_least("population.dimension", self.dimension, 2)
        require_positive("population.mean-norm", self.mean_norm)
        require_at_least("population.diversity", self.diversity, 0)
        require_at_least("1 - population.diversity", 1 - self.diversity, 0)

    def unit_norm(self, group_size: int) -> float:
        """Root mean square of the norm of the mean of group_size examples of one user: L(G)."""
        return math.sqrt(self.mean_norm**2 + 1 - self.diversity + self.diversity / group_size)


@dataclass(frozen=True)
class UnitMoments:
    """What one clipped unit adds in expectation.

    Attributes:
        shrinkage: κ; the mean of a clipped unit is κμ.
        square: E‖clip(unit)‖².
        again: E⟨clip(unit), clip(unit′)⟩ for one unit in two rounds, which may draw other examples.
        between: The same for two units of one user, which share no example.
    """

    shrinkage: float
    square: float
    again: float
    between: float


def mean_squared_error(population: Population, plan: Plan, learning_rate: np.ndarray) -> np.ndarray:
    """E‖θ_T − μ‖² over users, examples, sampling and noise, for each learning rate η in (0, 1].

    θ_T = Σ_t w_t·release_t with w_t = η(1 − η)^{T−1−t}; users are independent of each other, the rounds of one user
    are not.
    """
    eta = np.asarray(learning_rate, dtype=float)
    steps, q = plan.steps, plan.sampling_probability
    weight = -np.expm1(steps * np.log1p(-np.minimum(eta, 1 - 1e-16)))  # Σ w_t
    squares = eta * -np.expm1(2 * steps * np.log1p(-np.minimum(eta, 1 - 1e-16))) / (2 - eta)  # Σ w_t²
    moments = unit_moments(population, plan)
    units = plan.units_per_user(population.examples_per_user)
    one = squares * q * moments.square + (weight**2 - squares) * q**2 * moments.again
    second = units * one + units * (units - 1) * q**2 * weight**2 * moments.between
    mean = units * q * weight * moments.shrinkage * population.mean_norm
    users = population.num_users * (second - mean**2) / plan.normaliser**2
    noise = squares * plan.noise_std**2 * population.dimension / plan.normaliser**2
    bias = ((1 - weight * moments.shrinkage) * population.mean_norm) ** 2
    error: np.ndarray = bias + users + noise
    return error


def unit_moments(population: Population, plan: Plan) -> UnitMoments:
    """Moments of one clipped unit."""
    return _moments(population, plan.rows_per_unit(population.examples_per_user), plan.redraws, plan.clip_norm)


@cache
def _moments(population: Population, rows: int, redraws: bool, clip_norm: float) -> UnitMoments:
    """The moments of units of so many rows, drawn anew each round or kept."""
    dimension, center = population.dimension, population.mean_norm
    own, common = population.diversity / dimension, (1 - population.diversity) / dimension
    spread = math.sqrt(common + own / rows)

    def product(shared: int) -> float:
        """E⟨clip, clip′⟩ for two units of one user with so many rows in common."""
        together = math.sqrt(common + own * shared / rows**2)
        apart = math.sqrt(own * (rows - shared)) / rows
        return clipped_product(center, together, apart, clip_norm, dimension)

    square = clipped_square(center, spread, clip_norm, dimension)
    again = square
    if redraws:
        again = sum(chance * product(shared) for shared, chance in _overlaps(population.examples_per_user, rows))
    return UnitMoments(
        shrinkage=float(shrinkage(np.array([center]), spread, clip_norm, dimension)[0]),
        square=square,
        again=again,
        between=product(0),
    )


def _overlaps(owned: int, rows: int) -> list[tuple[int, float]]:
    """How many rows two draws of the same size share, and with which probability: hypergeometric."""
    chances = scipy.stats.hypergeom(owned, rows, rows).pmf(np.arange(rows + 1))
    return [(shared, float(chance)) for shared, chance in enumerate(chances) if chance > 1e-12]
