"""The closed-form error of private mean estimation by ULS and ELS.

Examples are x_{u,i} = μ + a·ξ_u + b·ζ_{u,i} in d dimensions, ξ and ζ Gaussian with expected squared norm 1, and
a² + b² = 1. The loss ½‖θ − x‖² is ½‖θ‖² − ⟨θ, x⟩ and a constant; its first term holds no data, so the server steps on
it exactly (weight decay), and only the second goes through clipping, sampling and noise:

    θ ← θ − η·(θ − release),    release = (Σ clip(unit) + N(0, σ²C²I)) / normaliser,

with units, sampling, noise and normaliser from a UlsPlan or ElsPlan. That keeps the iteration linear in the releases,
which is why its error, clipping included, has a closed form.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.stats import hypergeom

from experiments.mean_estimation.moments import clipped_product, clipped_square, shrinkage
from fedsim.plan import Plan, UlsPlan
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
        product: E⟨clip(unit), clip(unit′)⟩ for two units of one user: of two rounds (ULS), or of two examples (ELS).
    """

    shrinkage: float
    square: float
    product: float


def mean_squared_error(population: Population, plan: Plan, learning_rate: np.ndarray) -> np.ndarray:
    """E‖θ_T − μ‖² over users, examples, sampling and noise, for each learning rate η in (0, 1].

    θ_T = Σ_t w_t·release_t with w_t = η(1 − η)^{T−1−t}; users are independent of each other, the rounds of one user
    are not.
    """
    eta = np.asarray(learning_rate, dtype=float)
    steps, q = plan.steps, plan.sampling_probability
    weight = -np.expm1(steps * np.log1p(-np.minimum(eta, 1 - 1e-16)))  # Σ w_t
    squares = eta * -np.expm1(2 * steps * np.log1p(-np.minimum(eta, 1 - 1e-16))) / (2 - eta)  # Σ w_t²
    moments = unit_moments(population, plan.name, plan.group_size, plan.clip_norm)
    if isinstance(plan, UlsPlan):
        units = 1
        second = squares * q * moments.square + (weight**2 - squares) * q**2 * moments.product
    else:
        units = min(plan.group_size, population.examples_per_user)
        one = squares * q * moments.square + (weight**2 - squares) * q**2 * moments.square
        second = units * one + units * (units - 1) * q**2 * weight**2 * moments.product
    mean = units * q * weight * moments.shrinkage * population.mean_norm
    users = population.num_users * (second - mean**2) / plan.normaliser**2
    noise = squares * plan.noise_std**2 * population.dimension / plan.normaliser**2
    bias = ((1 - weight * moments.shrinkage) * population.mean_norm) ** 2
    return bias + users + noise


@cache
def _moments(
    dimension: int, mean_norm: float, diversity: float, examples: int, algorithm: str, group_size: int, clip: float
) -> UnitMoments:
    own, common = diversity / dimension, (1 - diversity) / dimension
    if algorithm == "els":
        group_size, overlaps = 1, {0: 1.0}
    else:
        # Two rounds draw G of n examples each; how many they share is hypergeometric.
        counts = np.arange(group_size + 1)
        chances = hypergeom(examples, group_size, group_size).pmf(counts)
        overlaps = {int(k): float(p) for k, p in zip(counts, chances, strict=True) if p > 1e-12}
    spread = math.sqrt(common + own / group_size)
    product = 0.0
    for shared, chance in overlaps.items():
        together = math.sqrt(common + own * shared / group_size**2)
        apart = math.sqrt(own * (group_size - shared)) / group_size
        product += chance * clipped_product(mean_norm, together, apart, clip, dimension)
    return UnitMoments(
        shrinkage=float(shrinkage(np.array([mean_norm]), spread, clip, dimension)[0]),
        square=clipped_square(mean_norm, spread, clip, dimension),
        product=product,
    )


def unit_moments(population: Population, algorithm: str, group_size: int, clip_norm: float) -> UnitMoments:
    """Moments of one clipped unit; group sizes above the examples a user owns are cut to them."""
    group_size = min(group_size, population.examples_per_user)
    return _moments(
        population.dimension,
        population.mean_norm,
        population.diversity,
        population.examples_per_user,
        algorithm,
        1 if algorithm == "els" else group_size,
        clip_norm,
    )
