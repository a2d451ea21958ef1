"""One block of random allocation: a user joins exactly one of t rounds, drawn uniformly, and nobody learns which.

Each round releases a sum of sensitivity 1 with N(0, σ²I). The block is dominated in both directions by
P = (1/t) Σ_j N(e_j, σ²I_t) against Q = N(0, σ²I_t) (Feldman and Shenfeld 2025, arXiv 2502.08202; Chua et al. 2024,
"Balls and bins", arXiv 2412.16802), also where what a round computes depends on all that earlier rounds released. Why:
let the others' rounds be given (a mixture over them is no easier to tell apart). In round j the user would add v_j,
‖v_j‖ ≤ 1, a function of the outputs before, and the block's likelihood ratio with the user against without is
S = (1/t) Σ_j W_j, log W_j = ⟨ξ_j, v_j⟩/σ − ‖v_j‖²/(2σ²), where without the user ξ_j ~ N(0, I) is fresh. Were
‖v_j‖ = 1, W_j would be log-normal whatever came before, hence the W_j independent, and S as under the pair. Where
‖v_j‖ = s < 1, multiply W_j by a fresh exp(√(1 − s²)·ζ_j/σ − (1 − s²)/(2σ²)) of mean 1 to make it so: S is
the mean of that given the outputs, and both privacy curves, of convex functions of S, only grow (Jensen). Blocks whose
allocations are independent compose, and so do they with sums of other independent draws in between: without the user
all W are independent, so that the ratio of everything is a product of independent ones.

What is asked of a run: the allocation is secret, independent of all else, over all t rounds of a block; a block that
ends early is post-processing of a whole one. For add or remove only: another user's place is another.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedsim.privacy.loss_cells import TINY, Floats, LossCells
from fedsim.privacy.ratio_sums import FARTHEST, LOST, WIDEST, Move, RatioLaw, add, finer, single, trimmed

MOST_POINTS = 12_000
"""About how many points a law may have; its own errors limit the bounds from there on."""
SKETCHED = 4
"""Points of the first law in one standard deviation."""
NEGLIGIBLE = 1e-4
"""Part of what lies beyond the ends of a grid that may be lost on the way."""
LEAST = 1e-290


@dataclass(frozen=True)
class AllocatedPair:
    """The pair above, known only between two others.

    Attributes:
        rounds: t, at least 2.
        noise: σ.
    """

    rounds: int
    noise: float

    @property
    def symmetric(self) -> bool:
        """Losses of a user added are smaller."""
        return False

    @property
    def least_loss(self) -> float:
        """There is no lower limit."""
        return -np.inf

    def loss_range(self, tail: float) -> tuple[float, float]:
        """Losses (low, high) with about Q(loss < low) ≤ tail and P(loss > high) ≤ tail; cells count the rest."""
        law = self._sketched
        points, (q, p) = law.points, law.masses
        low = int(np.searchsorted(np.cumsum(q) + law.nothing[0], tail))
        high = len(p) - 1 - int(np.searchsorted(np.cumsum(p[::-1]) + law.above[1], tail))
        # A value may have been moved by a step each time that two were added.
        room = 2 * law.spacing
        return float(points[min(low, len(q) - 1)]) - room, float(points[max(high, 0)]) + room

    def cells(self, edges: Floats) -> LossCells:
        """Probabilities of the cells between edges for a pair that dominates this one."""
        return self._cells(edges, "spread")

    def cells_below(self, edges: Floats) -> LossCells:
        """The same for a pair that this one dominates."""
        return self._cells(edges, "merge")

    def _cells(self, edges: Floats, move: Move) -> LossCells:
        law = self._law(edges, move)
        q, p = law.masses
        losses = law.points
        if move == "merge":
            losses = _group_losses(law)
            q, p = np.append(law.nothing[0], q), np.append(law.nothing[1], p)
        place = np.searchsorted(edges, losses)
        binned = [np.bincount(place, part, minlength=len(edges) + 1).astype(np.float64) for part in (p, q)]
        if move == "spread":
            binned[1][0] += law.nothing[0]
        slip = law.slip if move == "spread" else 0.0
        p_error, q_error = (
            2 * (law.relative + slip) * part + lost for part, lost in zip(binned, LOST[::-1], strict=True)
        )
        # Where a sum left the grid its loss is unknown: an infinite one in either direction.
        p_error[-1] += law.above[1]
        q_error[[0, -1]] += law.above[0]
        error = slip + 4 * law.relative
        rounding = 8 * np.finfo(float).eps * (1 + float(np.abs(edges[[0, -1]]).max()))
        return LossCells(
            edges=edges, p=binned[0], q=binned[1], p_error=p_error, q_error=q_error, loss_error=error + rounding
        )

    def _law(self, edges: Floats, move: Move) -> RatioLaw:
        sketched = self._sketched
        points, (q, p) = sketched.points, sketched.masses
        reach = float(edges[-1] - edges[0])
        asked = max(reach / (len(edges) - 1), reach / MOST_POINTS)
        beyond = min(float(q[points < edges[0]].sum()), float(p[points > edges[-1]].sum()))
        # In fives, so that both directions can share a law.
        lost = 5 * math.floor(math.log10(max(NEGLIGIBLE * beyond / self.rounds, LEAST)) / 5)
        return mean_law(self.rounds, self.noise, math.floor(math.log2(asked)), lost, move)

    @property
    def _sketched(self) -> RatioLaw:
        # The loss's standard deviation, roughly.
        width = min(1 / self.noise, math.sqrt(math.expm1(min(1 / self.noise**2, 50.0)) / self.rounds))
        return mean_law(
            self.rounds, self.noise, math.floor(math.log2(width / SKETCHED)), math.floor(math.log10(LEAST)), "spread"
        )


def _group_losses(law: RatioLaw) -> Floats:
    """log P/Q of each group, the lowest first; where Q has underflowed, what no value of the group lies below."""
    q, p = np.append(law.nothing[0], law.masses[0]), np.append(law.nothing[1], law.masses[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        losses = np.where(p > 0, np.log(p) - np.log(q), -np.inf)
    least: Floats = np.append(-np.inf, law.points - law.slip)
    return np.where(q > TINY, losses, least)


@lru_cache(maxsize=32)
def mean_law(rounds: int, noise: float, exponent: int, lost: int, move: Move) -> RatioLaw:
    """The law of the mean of the rounds' likelihood ratios.

    Args:
        rounds: t.
        noise: σ.
        exponent: The last grid has the spacing 2^exponent.
        lost: Power of ten: Q-measure below, and P-measure above, that may be cut off for each term of a sum.
        move: Whether the law's pair dominates or is dominated.
    """
    cut = max(10.0**lost, LEAST)
    spacings = _Spacings(rounds, noise, exponent, cut)
    # −Φ⁻¹ of a tail is below √(−2 log tail).
    reach = 1 / (2 * noise**2) + _deviations(cut) / noise
    power = single(noise, 2.0 ** spacings.of(1), (-reach, reach), move)
    law = power if rounds % 2 else None
    for place in range(1, rounds.bit_length()):
        power = _sum(power, power, spacings, cut)
        if rounds >> place & 1:
            law = power if law is None else _sum(power, finer(law, round(law.spacing / power.spacing)), spacings, cut)
    assert law is not None
    return law


def _sum(one: RatioLaw, other: RatioLaw, spacings: "_Spacings", cut: float) -> RatioLaw:
    terms = one.terms + other.terms
    law = add(one, other, max(round(one.spacing / 2.0 ** spacings.of(terms)), 1))
    return trimmed(law, cut * terms, cut * terms)


@dataclass(frozen=True)
class _Spacings:
    """How fine the grid of a sum of m terms must be for the errors of all sums of t/m of them to be alike.

    Errors of values that weigh alike average out: the spacing may fall with √(t/m). Where a single value may outweigh
    the others, its error stays.
    """

    rounds: int
    noise: float
    exponent: int
    tail: float

    def of(self, terms: int) -> int:
        """Binary logarithm of the spacing."""
        largest = 1 / (2 * self.noise**2) + min(_deviations(self.tail), 8.0) / self.noise
        outweighs = min(1.0, (math.exp(min(largest, 50.0)) + terms) / self.rounds)
        wider = math.floor(math.log2(min(math.sqrt(self.rounds / terms), 1 / outweighs)))
        widest = math.floor(math.log2(WIDEST / self.noise))
        return min(self.exponent + max(wider, 0), widest)


def _deviations(tail: float) -> float:
    return min(math.sqrt(-2 * math.log(tail)), FARTHEST)
