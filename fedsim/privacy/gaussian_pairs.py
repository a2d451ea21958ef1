"""Pairs of Gaussian mixtures on the line: the worst case of every sampled Gaussian sum.

Lemma (half-spaces are worst). Let γ_v be N(v, σ²I). Of all sets A with γ_0(A) = a, the half-space H = {x₁ ≥ t} of that
size has the largest γ_v(A) over ‖v‖ ≤ s, attained at v = s·e₁, and the smallest, attained at v = −s·e₁ (Neyman and
Pearson: each is a likelihood-ratio test of γ_0 against γ_v; and the optimum is monotone in s). One H serves all s at
once. So for any mixtures with ‖v_k‖ ≤ s_k and ‖v'_k‖ ≤ s_k, and any α ≥ 0,

    sup_A [Σ w_k γ_{v_k}(A) − α Σ w_k γ_{v'_k}(A)]  ≤  sup_t [Σ w_k γ_{s_k}(x ≥ t) − α Σ w_k γ_{−s_k}(x ≥ t)].

The right side is the hockey-stick divergence of two mixtures on the line, whose likelihood ratio is increasing. This
gives the dominating pair of replace-one (left as written), of remove (v' = 0: Choquette-Choo et al. 2024, Charles et
al. 2024, Theorem 2) and of add (v = 0), and it shows that raising any s_k, or moving weight to a larger s_k, can only
raise the divergence. All three are attained by aligned updates, hence tight.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import scipy
from numpy.typing import NDArray

from fedsim.privacy.loss_cells import LossCells

Floats = NDArray[np.float64]
ROUNDING = 4 * np.finfo(float).eps
CHUNK = 400_000
REACH = 39.0
"""Beyond so many standard deviations the tails of a Gaussian are 0 as floats."""
NEAR = 1e-6
"""How near the point of a given tail is found, in standard deviations."""
SECTIONS = 63
"""Points that are tried for it at once; fewer where there are many components."""
NARROWEST = 1e-12
"""The least range of losses."""
CLOSE = 1e-6
"""How near a cell's edge must come to its grid point, in grid steps: charged as an error of every loss."""


@dataclass(frozen=True)
class Mixture:
    """Σ_k weights_k · N(means_k, 1), in units of σ."""

    means: Floats
    log_weights: Floats
    weights: Floats = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", np.exp(self.log_weights))

    def log_ratio(self, x: Floats) -> tuple[Floats, Floats]:
        """log of the density over that of N(0, 1), and its derivative."""
        # Components first: sums over the long axis' neighbours are much faster than many short ones.
        exponents = np.multiply.outer(self.means, x) + (self.log_weights - self.means**2 / 2)[:, None]
        largest = exponents.max(axis=0)
        exponents -= largest
        np.exp(exponents, out=exponents)
        total = exponents.sum(axis=0)
        return largest + np.log(total), self.means @ exponents / total

    def least_above(self, tail: float) -> float:
        """A point above which lies at most `tail` of the probability: the least, but for NEAR or rounding."""
        low, high = self.means.min() - REACH, self.means.max() + REACH
        sections = int(np.clip(CHUNK // len(self.means), 1, SECTIONS)) + 1
        while high - low > NEAR + ROUNDING * (abs(low) + abs(high)):
            points = np.linspace(low, high, sections + 1)
            inner = points[1:-1]
            enough = self.weights @ scipy.special.ndtr(np.subtract.outer(self.means, inner)) <= tail
            place = int(np.argmax(enough)) if enough.any() else len(inner)
            low, high = points[place], points[place + 1]
        return float(high)

    def cells(self, x: Floats) -> tuple[Floats, Floats]:
        """Probability below x₀, between neighbours, above the last; and a bound on each one's rounding error."""
        z = np.subtract.outer(-self.means, -x)
        # Each component's tail, taken from its nearer side: differences then keep their relative precision.
        near = scipy.special.ndtr(-np.abs(z))
        doubt = self.weights @ (near * (1 + z * z))
        signed = np.where(z > 0, -near, near)
        mass = self.weights @ np.diff(signed, axis=1, prepend=0.0, append=0.0)
        np.add.at(mass, np.searchsorted(x, self.means, side="right"), self.weights)
        error = ROUNDING * (np.append(doubt, 0.0) + np.insert(doubt, 0, 0.0))
        return np.maximum(mass, 0.0), error


@dataclass(frozen=True)
class GaussianPair:
    """P (means ≥ 0) against Q (means ≤ 0), unit variance; the loss log dP/dQ increases in x.

    Attributes:
        above: P.
        below: Q.
        left_out: Probability under P, and under a mixture Q, that the mixtures leave out.
    """

    above: Mixture
    below: Mixture
    left_out: float = 0.0

    @property
    def symmetric(self) -> bool:
        """Whether Q mirrors P, so that both directions have the same losses."""
        return np.array_equal(self.above.means, -self.below.means) and np.array_equal(
            self.above.log_weights, self.below.log_weights
        )

    @property
    def gaussian_shift(self) -> float:
        """Distance of the means in units of σ, where P and Q are one Gaussian each and nothing else; NaN otherwise."""
        if self.left_out > 0:
            return np.nan
        means = np.unique(self.above.means), np.unique(self.below.means)
        return float(means[0][0] - means[1][0]) if len(means[0]) == len(means[1]) == 1 else np.nan

    @property
    def least_loss(self) -> float:
        """Infimum of the loss: finite where P and Q both stay at 0 with some probability and Q goes nowhere else."""
        if self.below.means.any() or not (self.above.means == 0).any():
            return -np.inf
        return float(np.logaddexp.reduce(self.above.log_weights[self.above.means == 0]))

    def loss(self, x: Floats) -> tuple[Floats, Floats]:
        """Loss and its derivative at each x."""
        return _by_chunks(self._loss, x, self._components)

    def loss_range(self, tail: float) -> tuple[float, float]:
        """Losses (low, high) with Q(loss < low) ≤ tail and P(loss > high) ≤ tail."""
        low = -Mixture(-self.below.means, self.below.log_weights).least_above(tail)
        losses, _ = self._loss(np.array([low - NEAR, self.above.least_above(tail) + NEAR]))
        # A grid needs some room also where the loss is all but 0, of a user who hardly ever takes part.
        room = NARROWEST if losses[1] - losses[0] < NARROWEST else 0.0
        return float(losses[0]) - room, float(losses[1]) + room

    def cells(self, edges: Floats) -> LossCells:
        """The probability of each cell of losses between neighbouring edges, under P and under Q."""
        inside = edges > self.least_loss + ROUNDING
        close = CLOSE * float(np.diff(edges).min(initial=np.inf))
        x = self._points(edges[inside], close)
        p, p_error = _by_chunks(self.above.cells, x, self._components, overlap=True)
        q, q_error = _by_chunks(self.below.cells, x, self._components, overlap=True)
        miss = self.loss(x)[0] - edges[inside]
        within = (x > self._table[0][0]) & (x < self._table[0][-1])
        rounding = ROUNDING * (1 + np.abs(x).max(initial=0.0) * np.abs(self._spread) + self._spread**2)
        missing = np.zeros(len(edges) - len(x))
        also = self.left_out if self.below.means.any() else 0.0
        return LossCells(
            edges=edges,
            p=np.concatenate([missing, p]),
            q=np.concatenate([missing, q]),
            p_error=np.concatenate([missing, p_error]) + self.left_out,
            q_error=np.concatenate([missing, q_error]) + also,
            loss_error=float(np.abs(miss[within]).max(initial=0.0) + rounding),
        )

    @property
    def _components(self) -> int:
        return len(self.above.means) + len(self.below.means)

    @property
    def _spread(self) -> float:
        return float(self.above.means.max() - self.below.means.min())

    def _loss(self, x: Floats) -> tuple[Floats, Floats]:
        up, slope_up = self.above.log_ratio(x)
        if not self.below.means.any():
            return up, slope_up
        down, slope_down = self.below.log_ratio(x)
        return up - down, slope_up - slope_down

    def _points(self, losses: Floats, close: float) -> Floats:
        """The x at which the loss is within `close` of each value: a table, then Newton steps inside its brackets."""
        table, at_table = self._table
        place = np.clip(np.searchsorted(at_table, losses), 1, len(table) - 1)
        left, right = table[place - 1], table[place]
        x = np.clip(np.interp(losses, at_table, table), left, right)
        todo = np.arange(len(x))
        for _ in range(60):
            value, slope = self.loss(x[todo])
            miss = value - losses[todo]
            done = (np.abs(miss) <= close) | (right[todo] - left[todo] <= ROUNDING * (1 + np.abs(x[todo])))
            todo, miss, slope = todo[~done], miss[~done], slope[~done]
            if not len(todo):
                break
            right[todo] = np.where(miss > 0, x[todo], right[todo])
            left[todo] = np.where(miss > 0, left[todo], x[todo])
            step = x[todo] - miss / np.maximum(slope, 1e-300)
            middle = (left[todo] + right[todo]) / 2
            x[todo] = np.where((step > left[todo]) & (step < right[todo]), step, middle)
        return np.maximum.accumulate(x)

    @cached_property
    def _table(self) -> tuple[Floats, Floats]:
        """Points that hold all the probability a float can express, and the loss there, non-decreasing."""
        points = np.linspace(self.below.means.min() - REACH, self.above.means.max() + REACH, 4097)
        return points, np.maximum.accumulate(self.loss(points)[0])


def _by_chunks(
    compute: Callable[[Floats], tuple[Floats, Floats]], x: Floats, components: int, *, overlap: bool = False
) -> tuple[Floats, Floats]:
    """compute over pieces of x, so that the points × components tables stay small."""
    size = max(CHUNK // components, 16)
    if len(x) <= size:
        return compute(x)
    pieces = [compute(x[start : start + size + overlap]) for start in range(0, len(x) - overlap, size)]
    if not overlap:
        return np.concatenate([piece[0] for piece in pieces]), np.concatenate([piece[1] for piece in pieces])
    first, last = pieces[0], pieces[-1]
    return tuple(  # type: ignore[return-value]
        np.concatenate([first[i][:1], *(piece[i][1:-1] for piece in pieces), last[i][-1:]]) for i in range(2)
    )
