"""A pair drawn by a public coin: which of several pairs the release is of is seen on both sides.

The loss is then that of the pair that was drawn, and H_α the mean of theirs.
"""

from dataclasses import dataclass

import numpy as np

from fedsim.privacy.fixed_size_pair import ReplacedInFixedSize
from fedsim.privacy.gaussian_pairs import ROUNDING, Floats, GaussianPair
from fedsim.privacy.loss_cells import LossCells

OnePair = GaussianPair | ReplacedInFixedSize
NEGLIGIBLE = 1e-290
"""Parts that are drawn less often than this are left out, and charged as a loss of ∞: ten million times are below any
δ that is asked for."""


@dataclass(frozen=True)
class MixedPair:
    """P = Σ w_i P_i against Q = Σ w_i Q_i, i seen.

    Attributes:
        parts: (w_i, P_i against Q_i); w_i > 0, summing to 1.
        left_out: Probability of what the parts leave out.
    """

    parts: tuple[tuple[float, OnePair], ...]
    left_out: float = 0.0

    @property
    def symmetric(self) -> bool:
        """Whether P against Q and Q against P have the same privacy curve: where each part's have."""
        return all(pair.symmetric for _, pair in self.parts)

    @property
    def least_loss(self) -> float:
        """A lower limit of the loss, −∞ where there is none."""
        return min(pair.least_loss for _, pair in self.parts)

    def loss_range(self, tail: float) -> tuple[float, float]:
        """Losses (low, high) with Q(loss < low) ≤ tail and P(loss > high) ≤ tail, tail < 1/2.

        Each part has an equal share of the tail; one that is drawn less often than that may lie beyond altogether.
        """
        shares = [(tail / (len(self.parts) * weight), pair) for weight, pair in self.parts]
        # One weight is at least their mean, so that one part is always left.
        ranges = [pair.loss_range(share) for share, pair in shares if share < 1 / 2]
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    def cells(self, edges: Floats) -> LossCells:
        """Probabilities of the cells between edges under P and under Q."""
        found = [pair.cells(edges) for _, pair in self.parts]
        weights = np.array([weight for weight, _ in self.parts])
        p, q, p_error, q_error = (
            weights @ np.stack(part)
            for part in zip(*((cells.p, cells.q, cells.p_error, cells.q_error) for cells in found), strict=True)
        )
        return LossCells(
            edges=edges,
            p=p,
            q=q,
            p_error=p_error + ROUNDING * p + self.left_out,
            q_error=q_error + ROUNDING * q + self.left_out,
            loss_error=max(cells.loss_error for cells in found),
        )


def mixed(*parts: tuple[float, OnePair]) -> MixedPair | OnePair:
    """The pair drawn by a public coin; a part of weight 0 is left out, one that is alone is itself.

    Args:
        parts: (weight, pair); weights ≥ 0 that sum to 1.
    """
    drawn = tuple((weight, pair) for weight, pair in parts if weight > NEGLIGIBLE)
    left_out = sum(weight for weight, _ in parts if weight <= NEGLIGIBLE)
    return drawn[0][1] if len(drawn) == 1 and left_out == 0 else MixedPair(drawn, left_out)
