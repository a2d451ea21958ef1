"""Sums of independent likelihood ratios on a grid of their logarithms, between two laws that keep both measures.

A round's likelihood ratio W = dP₁/dQ₁ has E_Q[W] = 1; of m rounds of which one random one holds the user it is
S = (W₁ + … + W_m)/m, whose P-measure is its Q-measure weighted by S. Both privacy curves are expectations under Q of
convex functions of S: δ(ε) = E_Q[(S − e^ε)₊] in the direction "remove", E_Q[(1 − e^ε S)₊] in "add". Hence two moves:

- **spread**: a value is replaced by random ones with this mean. E_Q φ(S) grows for every convex φ (Jensen), so that
  the pair dominates, and so do compositions of it (Zhu, Dong, Wang 2022, Theorem 10).
- **merge**: outcomes are told apart no longer; each gets its group's mean E_Q[S | group] = P(group)/Q(group). That is
  post-processing: the pair is dominated.

Both may be made with one term after the other, since the terms are independent: a spread of W₁ given W₁ is one of the
sum, and a function of merged terms is a function of the terms. The law of a sum of m terms thus comes by doubling. The
logarithm of a sum of two grid points that lie m steps apart is the larger one plus log(1 + e^{−mh}): the same part of
a step for all pairs so far apart. Where the smaller one adds less than a step, pairs are summed over before.

Every mass is a sum of products of positive numbers: no transform, no differences, small masses as accurate as large.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import scipy
from numpy.typing import NDArray

from fedsim.privacy.recursion import recursion

Floats = NDArray[np.float64]
Move = Literal["spread", "merge"]
EPS = float(np.finfo(float).eps)
NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)
WIDEST = 0.2
"""The widest cell, in standard deviations, that these nodes integrate to a relative 1e-15 out to FARTHEST: the error
is below 64/15·M·ρ^{−32} with M the largest size on the ellipse ρ = 4, at most e^{38·0.25} times that in the cell."""
FARTHEST = 37.5
"""Standard deviations beyond which nothing is looked for."""
LOST = np.array([1e-303, 1e-295])
"""More than is lost of either measure to underflow."""


@dataclass(frozen=True)
class RatioLaw:
    """The law of W₁ + … + W_m on points e^{ih}, i = start, start + 1, …

    Attributes:
        move: What made it: where values were spread they lie on the points; where outcomes were merged into groups
            named by points, their mean does not.
        terms: m.
        spacing: h.
        start: i of the first point.
        masses: Q- and P-measure at each point, float64 [2, n]. P has one random term of W's own P-measure.
        nothing: Q- and P-measure of a group below all points; at value 0 where spread.
        above: Bound on the Q- and P-measure of what lies above all points, and is left out.
        relative: Bound on the relative error of each measure.
        slip: How far the logarithm of a value may lie below its point: by rounding where values were spread.
    """

    move: Move
    terms: int
    spacing: float
    start: int
    masses: Floats
    nothing: Floats
    above: Floats
    relative: float
    slip: float

    @property
    def points(self) -> Floats:
        """log of the mean (not the sum) at each point."""
        index = self.start + np.arange(self.masses.shape[1], dtype=np.float64)
        return np.asarray(self.spacing * index - math.log(self.terms))


def single(noise: float, spacing: float, ends: tuple[float, float], move: Move) -> RatioLaw:
    """One Gaussian's likelihood ratio: log W ~ N(∓1/(2σ²), 1/σ²) under Q and P.

    Args:
        noise: σ.
        spacing: h, at most WIDEST/σ.
        ends: Values of log W between which cells are laid; inwards of FARTHEST deviations in any case.
        move: What is done with what lies in a cell.
    """
    if spacing * noise > WIDEST:
        raise ArithmeticError("a cell is too wide to be integrated")
    middle, reach = 1 / (2 * noise**2), FARTHEST / noise
    first = math.floor(max(ends[0], -middle - reach) / spacing)
    last = max(math.ceil(min(ends[1], middle + reach) / spacing), first + 1)
    logs = spacing * np.arange(first, last)
    inside = spacing * (NODES + 1) / 2
    z = noise * (logs + middle)
    # Densities over that at the cell's lower edge, so that a cell's mean is as accurate where they underflow.
    within = np.exp(-noise * inside * (2 * z[:, None] + noise * inside) / 2)
    q_part = within @ WEIGHTS * (spacing * noise / 2)
    p_part = (within * np.exp(inside)) @ WEIGHTS * (spacing * noise / 2)
    density = [np.exp(-((z - shift) ** 2) / 2) / math.sqrt(2 * math.pi) for shift in (0.0, 1 / noise)]
    low, high = noise * (spacing * first + middle), noise * (spacing * last + middle)
    nothing = np.array([scipy.special.ndtr(low), scipy.special.ndtr(low - 1 / noise)])
    above = np.array([scipy.special.ndtr(-high), scipy.special.ndtr(1 / noise - high)]) * (1 + 1e-9)
    relative = 32 * EPS * (1 + (FARTHEST + 1 / noise) ** 2)
    masses = np.stack([density[0] * q_part, density[1] * p_part])
    if move == "merge":
        return RatioLaw(move, 1, spacing, first, masses, nothing, above, relative, 0.0)
    share = np.clip((p_part / q_part - 1) / math.expm1(spacing), 0.0, 1.0)
    spread = np.zeros((2, len(logs) + 1))
    spread[0, :-1] += masses[0] * (1 - share)
    spread[0, 1:] += masses[0] * share
    # The P-measure of a point is its Q-measure times e^{log W}: the densities' own ratio at the lower edge.
    spread[1, :-1] += density[1] * q_part * (1 - share)
    spread[1, 1:] += density[1] * q_part * share * math.exp(spacing)
    at_first = nothing[1] * math.exp(-spacing * first) if nothing[1] > 1e-300 else 0.0
    spread[:, 0] += at_first, nothing[1]
    nothing = np.array([max(nothing[0] - at_first, 0.0), 0.0])
    return RatioLaw(move, 1, spacing, first, spread, nothing, above, relative, relative)


def add(one: RatioLaw, other: RatioLaw, refine: int = 1) -> RatioLaw:
    """The law of the sum of two independent sums with grids of one spacing, on a grid finer by a whole factor."""
    terms = one.terms + other.terms
    fine = one.spacing / refine
    start = refine * min(one.start, other.start)
    most = max(one.start + one.masses.shape[1], other.start + other.masses.shape[1])
    found = np.zeros((2, refine * most - start + math.ceil(math.log(2) / fine) + 3))
    if one is other:
        _add_smaller(found, start, one, one, refine, twice=True)
    else:
        _add_smaller(found, start, one, other, refine, twice=False)
        _add_smaller(found, start, other, one, refine, twice=False, apart=1)
    nothing = np.array([one.nothing[0] * other.nothing[0], _mixed(one, other, one.nothing, other.nothing)])
    above = np.array([one.above[0] + other.above[0], 0.0])
    above[1] = sum(
        part.terms * part.above[1] + rest.terms * part.above[0] for part, rest in ((one, other), (other, one))
    )
    above[1] /= terms
    sums = 4 * found.shape[1] + 64
    relative = one.relative + other.relative + sums * EPS
    slip = max(one.slip, other.slip) + (fine / 2 if one.move == "merge" else 64 * EPS)
    return RatioLaw(one.move, terms, fine, start, found, nothing, above, relative, slip)


def _mixed(one: RatioLaw, other: RatioLaw, at_one: Floats, at_other: Floats) -> float:
    """P-measure of a pair of groups, of which one holds the term that is P's."""
    value = one.terms * at_one[1] * at_other[0] + other.terms * at_one[0] * at_other[1]
    return float(value / (one.terms + other.terms))


def _add_smaller(
    found: Floats, start: int, one: RatioLaw, other: RatioLaw, refine: int, *, twice: bool, apart: int = 0
) -> None:
    """Add to `found` the pairs in which the point of `one` is the larger, by at least `apart` steps.

    Args:
        found: Masses, float64 [2, n].
        start: Index of its first point.
        one, other: What is added up.
        refine: How much finer the grid of `found` is.
        twice: Both are the same: each pair of different points counts twice.
        apart: 0, or 1.
    """
    step, fine = one.spacing, one.spacing / refine
    near = max(math.ceil(math.log(2 / fine) / step), 1)
    own = one.masses.shape[1]
    # Measures of a pair: Q·Q, and P·Q + Q·P in parts of the terms. A spread pair lies on points, where P = S·Q: then
    # the larger one's own ratio gives it, which may be known where its Q-measure has underflowed.
    share = one.terms / (one.terms + other.terms)
    larger = one.masses * np.array([[1.0], [share]])
    lone = one.masses[0] * (1 - share)
    lags = np.arange(apart, max(min(near, one.start + own - other.start), apart))
    times = np.where(lags > 0, 2.0 if twice else 1.0, 1.0)
    exact = np.log1p(np.exp(-step * lags)) / fine
    steps = np.rint(exact) if one.move == "merge" else np.floor(exact)
    upper = np.clip(np.expm1((exact - steps) * fine) / math.expm1(fine), 0.0, 1.0)
    # All lags whose pairs come to lie on the same step are summed over at once.
    bounds = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(lags)]
    for begin, end in pairwise(bounds if len(lags) else []):
        to, first = int(steps[begin]), int(lags[begin]) + other.start - one.start
        # Places in `one` of the larger points, and in the convolution of the smaller ones.
        left, right = max(first, 0), min(first + other.masses.shape[1] + end - begin - 1, own)
        if left >= right:
            continue
        place = refine * (one.start + left) - start + to
        target = found[:, place : place + refine * (right - left - 1) + 1 : refine]
        taken, weights = slice(left - first, right - first), times[begin:end]
        if one.move == "merge":
            target += larger[:, left:right] * np.convolve(other.masses[0], weights)[taken]
            target[1] += lone[left:right] * np.convolve(other.masses[1], weights)[taken]
            continue
        parts = upper[begin:end]
        for more, part in ((0, weights * (1 - parts)), (1, weights * parts)):
            smaller = np.convolve(other.masses[0], part)[taken]
            target = found[:, place + more : place + more + refine * (right - left - 1) + 1 : refine]
            target += larger[:, left:right] * smaller * np.array([[1.0], [math.exp((to + more) * fine)]])
    _add_far(found[:, refine * one.start - start :], one, other, refine, near, larger, lone, 2.0 if twice else 1.0)


def _add_far(
    found: Floats,
    one: RatioLaw,
    other: RatioLaw,
    refine: int,
    near: int,
    larger: Floats,
    lone: Floats,
    times: float,
) -> None:
    """The pairs so far apart that the smaller one adds less than half a step; `found` begins at one's first point."""
    own = one.masses.shape[1]
    # How many of other's points lie so far below each of one's.
    below = np.clip(np.arange(own) + one.start - near - other.start + 1, 0, other.masses.shape[1])
    sums = np.concatenate([other.nothing[:, None], other.nothing[:, None] + np.cumsum(other.masses, axis=1)], axis=1)
    smaller = times * sums[:, below]
    stop = refine * (own - 1) + 1
    product = larger * smaller[0]
    if one.move == "merge":
        product[1] += lone * smaller[1]
        found[:, 0:stop:refine] += product
        return
    fine = one.spacing / refine
    decay = math.exp(-one.spacing)
    values = np.append(0.0, recursion([1.0, -decay], other.masses[0]))[below]
    lag = np.maximum(np.arange(own) + one.start - (other.start + below - 1), 0)
    parts = times * values * np.exp(-one.spacing * lag) / math.expm1(fine)
    rest = np.maximum(smaller[0] - parts, 0.0)
    found[:, 0:stop:refine] += larger * rest
    found[:, 1 : stop + 1 : refine] += larger * parts * np.array([[1.0], [math.exp(fine)]])


def trimmed(law: RatioLaw, low: float, high: float) -> RatioLaw:
    """The law without the points at the ends: below, of Q-measure low at most; above, of P-measure high at most."""
    masses = law.masses
    first = int(np.searchsorted(np.cumsum(masses[0]), low, side="right"))
    last = masses.shape[1] - int(np.searchsorted(np.cumsum(masses[1, ::-1]), high, side="right"))
    first = min(first, masses.shape[1] - 1)
    last = max(last, first + 1)
    kept = masses[:, first:last].copy()
    below, above = masses[:, :first], masses[:, last:].sum(axis=1)
    nothing = law.nothing.copy()
    if law.move == "merge":
        nothing += below.sum(axis=1)
    else:
        # To 0 and the first point that is kept, which gets all of the P-measure.
        shares = np.exp(-law.spacing * np.arange(first, 0, -1))
        kept[:, 0] += below[0] @ shares, below[1].sum()
        nothing[0] += below[0] @ (1 - shares)
    above = law.above + above * (1 + 2 * law.relative)
    return RatioLaw(
        law.move,
        law.terms,
        law.spacing,
        law.start + first,
        kept,
        nothing,
        above,
        law.relative + (2 * masses.shape[1] + 8) * EPS,
        law.slip + 8 * EPS,
    )


def finer(law: RatioLaw, factor: int) -> RatioLaw:
    """The same law on a grid finer by a whole factor."""
    masses = np.zeros((2, factor * (law.masses.shape[1] - 1) + 1))
    masses[:, ::factor] = law.masses
    return RatioLaw(
        law.move,
        law.terms,
        law.spacing / factor,
        factor * law.start,
        masses,
        law.nothing,
        law.above,
        law.relative,
        law.slip,
    )
