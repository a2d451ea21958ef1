"""How much better held-out users are predicted than before training, released with noise.

Each held-out user u who is measured adds s_u = L_u(θ_t) − L_u(θ_0), clipped to ±c, which depends on nothing but this
user's data, the two models, which are released, and c. What leaves is (Σ s_u + N(0, σ²c²))/n for a public n: one
Gaussian release of sensitivity c where a user is added or removed, and 2c where one is replaced.

Training and held-out users are told apart by each user's own keyed hash, so that these releases and those of training
are about different users, and nobody pays for both (`fedsim.privacy.splits`).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from fedsim.privacy.calibration import calibrate_noise_multiplier
from fedsim.privacy.events import Adjacency, Event, Gaussian, Repeated
from fedsim.privacy.mechanisms.noise import NoiseSource
from fedsim.validation import require_at_least, require_positive

GRID_BITS = 24
"""Users' changes are whole multiples of a public step, so many bits below the clip norm: their sum is exact in
float64, in whatever order, for half a billion users."""


@dataclass(frozen=True, kw_only=True)
class PrivateEvaluation:
    """The private evaluations of one run.

    Attributes:
        noise_multiplier: σ, noise standard deviation over the clip norm.
        clip_norm: c, the largest change of one user's loss that counts, nats.
        count: Most releases of the run, known before it begins.
        users: n, by which sums are divided: how many users are measured on average; public, whoever is measured.
        population: N, held-out users, which is public; 0 stands for as many as are measured.
    """

    noise_multiplier: float
    clip_norm: float
    count: int
    users: int
    population: int = 0

    def __post_init__(self) -> None:
        require_positive("noise_multiplier", self.noise_multiplier)
        require_positive("evaluation.private-clip", self.clip_norm)
        require_at_least("count", self.count, 1)
        require_at_least("users", self.users, 1)
        object.__setattr__(self, "population", self.population or self.users)
        require_at_least("population", self.population, self.users)

    @classmethod
    def calibrated(
        cls,
        *,
        epsilon: float,
        delta: float,
        count: int,
        clip_norm: float,
        users: int,
        population: int = 0,
        adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER,
    ) -> Self:
        """With the least noise with which so many releases together are (epsilon, delta)-differentially private.

        Args:
            epsilon, delta, adjacency: The guarantee of all of them together.
            count, clip_norm, users, population: As the attributes.

        Raises:
            InvalidInput: For a value out of range.
        """
        require_at_least("count", count, 1)

        def releases(noise_multiplier: float) -> Event:
            return Repeated(event=Gaussian(noise_multiplier=noise_multiplier), count=count)

        found = calibrate_noise_multiplier(releases, epsilon=epsilon, delta=delta, adjacency=adjacency)
        return cls(noise_multiplier=found.value, clip_norm=clip_norm, count=count, users=users, population=population)

    @property
    def release_event(self) -> Gaussian:
        """What one evaluation releases of the held-out users."""
        return Gaussian(noise_multiplier=self.noise_multiplier)

    @property
    def event(self) -> Repeated:
        """What all evaluations of the run release of the held-out users, where none is left out."""
        return Repeated(event=self.release_event, count=self.count)

    @property
    def standard_deviation(self) -> float:
        """Of the noise in each released value, nats."""
        return self.noise_multiplier * self.clip_norm / self.users

    @property
    def resolution(self) -> float:
        """Step of the public grid that clipped changes, and so their sums, lie on, nats."""
        return math.ldexp(1.0, math.frexp(self.clip_norm)[1] - GRID_BITS)

    def clipped(self, changes: np.ndarray) -> np.ndarray:
        """What each user adds to the sum, each by its own change alone.

        Args:
            changes: Of each user measured, nats, float64 [users]. One that is no finite number counts as the worst,
                +c.

        Returns:
            float64 [users], multiples of `resolution` within ±c.
        """
        changes = np.asarray(changes, dtype=np.float64)
        bounded = np.clip(np.where(np.isfinite(changes), changes, self.clip_norm), -self.clip_norm, self.clip_norm)
        return np.trunc(bounded / self.resolution) * self.resolution  # toward zero, and so never beyond ±c

    def release(self, changes: np.ndarray, noise: NoiseSource) -> float:
        """The released mean change of the loss, nats: below zero where held-out users are predicted better.

        Args:
            changes: As for `clipped`.
            noise: Of this release, on a grid that holds `resolution`; used for nothing else.
        """
        total = np.array([self.clipped(changes).sum()])
        noise.add_normal(total, self.noise_multiplier * self.clip_norm)
        return float(total[0]) / self.users

    def to_values(self) -> dict[str, Any]:
        """As JSON values, which the constructor takes."""
        return asdict(self)


def evaluations_of(rounds: int, every: int) -> int:
    """Most evaluations of a run after its first round: one after every so many rounds, and one of the last model.

    Where a run ends early its last model comes instead of a later evaluation. The model before the first round has
    changed nothing, and needs no release.
    """
    return math.ceil(rounds / every)
