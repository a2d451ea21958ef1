"""Adaptive clipping: C follows a quantile of the units' norms, by a noised count of the units below it.

Andrew, Thakkar, McMahan and Ramaswamy 2021, "Differentially Private Learning with Adaptive Clipping". Each unit (a
user in ULS, an example in ELS) adds to the sum its clipped update and to the count b − ½, where b says whether its
norm was at most C. Theorem 1 there: releasing the sum with noise multiplier z and the count with standard deviation
σ_b is one Gaussian release of multiplier σ, where

    σ⁻² = z⁻² + (2σ_b)⁻²,

since (update/(zC), (b − ½)/σ_b) has norm at most √(z⁻² + ¼σ_b⁻²) = 1/σ. So the event of the plan stays what it was, at
σ, and the sum gets the slightly larger z. Units are sampled together for both, so sampling and group size change
nothing. C_t depends on earlier noised counts only.

Where a user's units are emptied rather than taken away (fixed-graph adjacency) an emptied unit has the norm 0, and
would be below: what it added before, −½, would become +½, twice what the theorem has. There a unit of norm 0 adds
nothing, as one that is not there.

The count is released as every sum is: an exact value on a public grid, noised on that grid. C_t is published with all
its digits, and follows from the noised count alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.privacy.mechanisms.noise import NoiseSource
from fedsim.validation import require_between, require_positive

COUNT_RESOLUTION = 0.5
"""Counts Σ(b − ½) are whole multiples of it: the grid that their noise must lie on too."""


@dataclass(frozen=True, kw_only=True)
class QuantileClip:
    """The rule by which the clip norm moves.

    Attributes:
        quantile: γ: the share of units whose norm should be at most C.
        learning_rate: η of the geometric update C ← C·exp(−η(b̄ − γ)).
        count_std: σ_b, standard deviation of the noise on the count, in units.
        expected_units: M or B, the public number by which the count is divided.
    """

    name: ClassVar[str] = "quantile-clip"

    quantile: float = 0.5
    learning_rate: float = 0.2
    count_std: float
    expected_units: float

    def __post_init__(self) -> None:
        require_between("plan.clip-quantile", self.quantile, 0, 1)
        require_positive("plan.clip-learning-rate", self.learning_rate)
        require_positive("plan.clip-count-std", self.count_std)
        require_positive("expected_units", self.expected_units)

    def sum_noise_multiplier(self, noise_multiplier: float) -> float:
        """z, the noise multiplier of the sum, at least noise_multiplier = σ.

        Raises:
            InvalidInput: When the count alone would use up σ (2σ_b ≤ σ).
        """
        if noise_multiplier == 0:
            return 0.0
        left = noise_multiplier**-2 - (2 * self.count_std) ** -2
        if left <= 0:
            raise InvalidInput(
                "plan.clip-count-std",
                self.count_std,
                f"above half the noise multiplier, {noise_multiplier / 2:.4g}",
                "Raise it, or compute more units a round.",
            )
        return 1 / math.sqrt(left)

    def counted(self, statistics: Mapping[str, float], *, emptied: bool) -> float:
        """How many units of a round are counted.

        Args:
            statistics: Sums over the round's units: "units", and where any took part "empty_units", those of norm 0.
            emptied: Whether neighbouring data has a user's units emptied, where they are, rather than without them.
        """
        units = statistics["units"]
        return units - statistics["empty_units"] if emptied and units else units

    def noised_fraction(self, below: float, units: float, source: NoiseSource, *, private: bool) -> float:
        """The released estimate of the share of units with norm at most C.

        Args:
            below: How many units of the round were below.
            units: How many are counted; only Σ(b − ½) = below − units/2 is used, and it is noised.
            source: Noise of this release, on a grid that holds COUNT_RESOLUTION; used for nothing else.
            private: Whether to add noise.
        """
        count = np.array([below - units / 2])
        if private:
            source.add_normal(count, self.count_std)
        return 0.5 + float(count[0]) / self.expected_units

    def moved(self, clip_norm: float, fraction: float) -> float:
        """The next round's clip norm."""
        return clip_norm * math.exp(-self.learning_rate * (float(np.clip(fraction, 0.0, 1.0)) - self.quantile))

    def in_words(self, clip_norm: float, *, private: bool) -> str:
        """What moves, by what, and what else is released for it."""
        noise = f"with Gaussian noise of standard deviation {self.count_std:g}" if private else "without noise"
        together = "; sum and count together are one Gaussian release at the noise multiplier" if private else ""
        return (
            f"the clip norm begins at {clip_norm:g} and follows the {self.quantile:g}-quantile of the units' norms "
            f"(learning rate {self.learning_rate:g}), and the noise with it: each step also releases a count of the "
            f"units below it, {noise}{together}"
        )
