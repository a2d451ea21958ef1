"""A cohort of fixed size drawn without replacement: the pair that dominates it.

Let S′ be the other m − 1 members, u the user, w another. With probability γ = m/n the cohort holds u. Given S′ and
w, the outputs with and without u differ only in u against w, whose contributions have norm at most 1, hence a distance
of at most 2. By joint convexity (Balle, Barthe, Gaboardi 2018, Theorem 9; Zhu, Dong, Wang 2022, Theorem 11), with
B = N(0, σ²), A = N(2, σ²) and H_α the hockey-stick divergence:

    add or remove u (n − 1 users remain):  H_α(γA + (1 − γ)B ‖ B) and H_α(B ‖ γA + (1 − γ)B);
    replace u:  H_α(γA + (1 − γ)B ‖ B) for α ≥ 1, H_α(A ‖ γB + (1 − γ)A) for α < 1.

Both are upper bounds. That they are tight for sums is not claimed: the bounds bracket the ε of the dominating pair.
"""

from dataclasses import dataclass

import numpy as np

from fedsim.privacy.gaussian_pairs import Floats, GaussianPair
from fedsim.privacy.loss_cells import LossCells


@dataclass(frozen=True)
class ReplacedInFixedSize:
    """The replace-one curve above, as one pair: losses above 0 from the first line, below 0 from the second.

    Its losses are symmetric. What neither side holds is an atom at loss 0, because the curve has a kink at α = 1.

    Attributes:
        removed: γA + (1 − γ)B against B.
    """

    removed: GaussianPair

    @property
    def symmetric(self) -> bool:
        """Both directions have the same privacy curve."""
        return True

    @property
    def least_loss(self) -> float:
        """There is no lower limit."""
        return -np.inf

    def loss_range(self, tail: float) -> tuple[float, float]:
        """Losses (low, high) with Q(loss < low) ≤ tail and P(loss > high) ≤ tail."""
        high = max(self.removed.loss_range(tail)[1], 1e-12)
        return -high, high

    def cells(self, edges: Floats) -> LossCells:
        """Probabilities of the cells between edges; the atom belongs to the cell that ends at or contains 0."""
        inner = np.unique(np.concatenate([[0.0], np.abs(edges)]))
        half = self.removed.cells(inner)
        above = _merge(half, inner, edges)
        below = _merge(half, inner, -edges[::-1])
        p, q, p_error, q_error = (
            high + low[::-1]
            for high, low in (
                (above[0], below[1]),
                (above[1], below[0]),
                (above[2], below[3]),
                (above[3], below[2]),
            )
        )
        atom = max(1.0 - half.p[1:].sum() - half.q[1:].sum(), 0.0)
        place = int(np.searchsorted(edges, 0.0))
        error = 1e-15 + half.p_error[1:].sum() + half.q_error[1:].sum()
        p[place] += atom
        q[place] += atom
        p_error[place] += error
        q_error[place] += error
        return LossCells(edges=edges, p=p, q=q, p_error=p_error, q_error=q_error, loss_error=half.loss_error)


def _merge(half: LossCells, inner: Floats, edges: Floats) -> list[Floats]:
    """The parts of cells of losses above 0, summed into the cells of edges."""
    # Cell i + 1 of half lies just above inner[i].
    target = np.searchsorted(edges, inner, side="right")
    return [
        np.bincount(target, weights=part[1:], minlength=len(edges) + 1).astype(np.float64)
        for part in (half.p, half.q, half.p_error, half.q_error)
    ]
