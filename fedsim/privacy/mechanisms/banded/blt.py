"""Buffered linear Toeplitz noise (BLT): noise that takes back a little of all rounds before, from a few buffers.

C has the coefficients c_0 = 1, c_i = Σ_j ω_j·θ_j^{i−1} (i ≥ 1), without a band limit, and x = C⁻¹ξ comes from one
buffer for each j in place of one vector for each band:

    x = ξ − Σ_j ω_j·B_j,    then    B_j ← θ_j·B_j + x

(Dvijotham et al. 2024, arXiv 2404.16706; for users who come back, McMahan et al. 2024, arXiv 2408.08868). It is for
cohorts that cannot be sampled: nothing is amplified, a user takes part at most k times, with a least distance between
any two, and the whole run is one Gaussian release of `participation_sensitivity`.

Where users take turns, every g rounds, this can be charged turn by turn. Let S_j be the squared sensitivity of j turns
in their j·g rounds. In the l-th block of g rounds a user moves row m by Σ_{i≤l} c_{m+ig}, which grows with l since no
c is below 0; so S_j is a sum of j terms that do not fall, and S_j ≤ (j/k)·S_k. Noise of √(S_k/k) clip norms (`norm`)
times σ makes whatever a user's first j ≤ k turns have released, wherever the run ends before the next, a Gaussian
release with shift at most √j/σ: no more than j releases at σ. After a lost round a new chain begins, whose turns are
counted on top.

With ω_j > 0 and 0 < θ_j < 1, c falls from c_1 on, and falls altogether if Σ ω_j ≤ 1. The stronger Σ ω_j/θ_j < 1 is
asked for here. In u = 1/z, c(z) is 1 + Σ_j ω_j/(u − θ_j): it falls between its poles, so that its zeros lie one
between any two neighbouring θ and one below them all, and this one is above 0 exactly where the value at u = 0,
1 − Σ ω_j/θ_j, is above 0. Then 1/c(z) has coefficients β_0 = 1, β_i = −Σ_j ω̂_j·θ̂_j^{i−1} with all ω̂_j > 0 and
0 < θ̂_j < 1: each round takes back, none adds, and the noise of a single round stays bounded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import scipy

from fedsim.errors import InvalidInput
from fedsim.privacy.mechanisms.banded.coefficients import participation_sensitivity
from fedsim.privacy.mechanisms.banded.workload import Workload
from fedsim.validation import require_at_least

MOST_BUFFERS = 8
"""More gain nothing that float64 can tell: neighbouring decays run into each other."""
CLOSE = 2.0**-40
"""More than the relative rounding error of the coefficients, which are sums of a few positive powers."""
SPREADS = (1.0, 0.7, 0.4)
"""How widely the decays are spread that the search starts from: 1 − θ from ½ to 1/(2T), to these powers."""
OPTIONS = {"maxiter": 500, "maxcor": 20, "ftol": 1e-11, "gtol": 1e-7}


@dataclass(frozen=True, kw_only=True)
class BufferedToeplitz:
    """Noise with one buffer for each weight and decay.

    Both are rounded to float32, in which buffers may be kept: the coefficients whose sensitivity is accounted are
    those that the buffers apply. A decay that differs in its eighth digit is another after a thousand rounds.

    Attributes:
        weights: ω_j > 0.
        decays: θ_j, between 0 and 1, with Σ ω_j/θ_j < 1.
    """

    weights: tuple[float, ...]
    decays: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("weights", "decays"):
            object.__setattr__(self, name, tuple(float(np.float32(value)) for value in getattr(self, name)))
        if not 1 <= len(self.decays) == len(self.weights) <= MOST_BUFFERS:
            raise InvalidInput("weights", self.weights, f"one a decay, between 1 and {MOST_BUFFERS} of them")
        if not all(0 < decay < 1 for decay in self.decays):
            raise InvalidInput("decays", self.decays, "numbers above 0 and below 1")
        if not (min(self.weights) > 0 and sum(w / d for w, d in zip(self.weights, self.decays, strict=True)) < 1):
            raise InvalidInput("weights", self.weights, "numbers above 0 whose sum, each over its decay, is below 1")

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[float, float]]) -> Self:
        """From (weight, decay) of each buffer."""
        return cls(weights=tuple(one for one, _ in pairs), decays=tuple(two for _, two in pairs))

    @property
    def pairs(self) -> tuple[tuple[float, float], ...]:
        """(weight, decay) of each buffer."""
        return tuple(zip(self.weights, self.decays, strict=True))

    def coefficients(self, rounds: int) -> np.ndarray:
        """c, float64 [rounds], non-negative and non-increasing from c_0 = 1."""
        lags = np.arange(rounds - 1)
        later = np.power.outer(np.array(self.decays), lags)
        return np.concatenate([[1.0], np.array(self.weights) @ later])

    def sensitivity(self, rounds: int, separation: int, participations: int) -> float:
        """`participation_sensitivity` in clip norms, rounded up past the rounding of the coefficients."""
        sensitivity = participation_sensitivity(self.coefficients(rounds), rounds, separation, participations)
        return sensitivity * (1 + CLOSE)

    def norm(self, separation: int, turns: int) -> float:
        """√(S_k/k), rounded up: standard deviation over σ of the fresh noise, in clip norms.

        At it each of a user's k turns, every `separation` rounds, costs no more than a release at σ.
        """
        return _norm(self, separation, turns)

    def error(self, workload: Workload, separation: int, participations: int) -> float:
        """Root mean square over the rounds of the noise's standard deviation in the parameters, one coordinate.

        At σ = 1, clip norm 1 and divisor 1, with the factor of the sensitivity: what `Workload.error` is for banded
        noise with the factor ‖c‖₂.
        """
        c = self.coefficients(workload.rounds)
        sensitivity = self.sensitivity(workload.rounds, separation, participations)
        return sensitivity * workload.error(c) / float(np.linalg.norm(c))

    def correlate(self, fresh: np.ndarray, buffers: np.ndarray) -> np.ndarray:
        """One round's x of its fresh noise ξ.

        Args:
            fresh: ξ, [P].
            buffers: B, [number of buffers, P], zeros before the first round; moved on in place.
        """
        # Value by value, so that the bits do not depend on which values are computed together.
        x, number = fresh.copy(), buffers.dtype.type
        for weight, buffer in zip(self.weights, buffers, strict=True):
            x -= number(weight) * buffer
        for decay, buffer in zip(self.decays, buffers, strict=True):
            buffer *= number(decay)
            buffer += x
        return x

    def in_words(self, norm: float) -> str:
        """What this noise is beside independent noise, as an addition to a sentence that says which noise is added.

        Args:
            norm: How many times as strong the fresh noise is.
        """
        weights, decays = (", ".join(f"{value:.4g}" for value in values) for values in (self.weights, self.decays))
        return (
            f", {norm:.4g} times as strong as that and correlated over all rounds through buffers: a round's "
            f"noise, in units of its own clip, is fresh noise less {weights} times the buffers, which are then "
            f"{decays} times what they were, and that noise; so that all rounds together release what fresh noise "
            "hides"
        )

    @classmethod
    def optimal(cls, buffers: int, workload: Workload, separation: int, participations: int) -> Self:
        """The noise of so many buffers with the least error that a search from a few fixed starts finds.

        Where bands as long as the separation fit into memory, `optimal_coefficients` of so many is usually better:
        their columns share no row. A second moment is left out of the search: it moves the optimum by about 1 %.

        Args:
            buffers: Number of buffers; two to five are what is useful.
            workload: What the optimizer makes of the releases.
            separation: Least distance in rounds between two participations of one user.
            participations: The most participations of one user.

        Raises:
            InvalidInput: For numbers out of range.
        """
        if not 1 <= buffers <= MOST_BUFFERS:
            raise InvalidInput("buffers", buffers, f"a whole number from 1 to {MOST_BUFFERS}")
        for name, value in (("separation", separation), ("participations", participations)):
            require_at_least(name, value, 1)
        rounds = workload.rounds
        # The ends keep what is found away from its limits by more than its rounding to float32.
        bounds = [(-30.0, 12.0)] * buffers + [(-5.0, 16.0)] * buffers

        def objective(free: np.ndarray) -> tuple[float, np.ndarray]:
            return _log_square(free, workload, separation, participations)

        fading = np.geomspace(0.5, 0.5 / rounds, buffers)
        runs = []
        for spread in SPREADS:
            start = np.concatenate([np.full(buffers, -math.log(buffers)), np.log(1 / fading**spread - 1)])
            runs.append(
                scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=OPTIONS)
            )
        weights, decays = _parameters(min(runs, key=lambda run: float(run.fun)).x)
        order = np.argsort(decays)
        return cls(weights=tuple(weights[order].tolist()), decays=tuple(decays[order].tolist()))


@lru_cache(maxsize=16)
def _norm(noise: BufferedToeplitz, separation: int, turns: int) -> float:
    sensitivity = noise.sensitivity(separation * turns, separation, turns)
    # CLOSE again, which is more than what root and quotient round.
    return sensitivity / math.sqrt(turns) * (1 + CLOSE)


def _parameters(free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights and decays of unbounded numbers: θ_j their logistic function, and ω_j/θ_j shares of less than 1."""
    shares, logits = np.split(free, 2)
    decays = 1 / (1 + np.exp(-logits))
    portions = np.exp(shares)
    return decays * portions / (1 + portions.sum()), decays


def _log_square(
    free: np.ndarray, workload: Workload, separation: int, participations: int
) -> tuple[float, np.ndarray]:
    """The logarithm of the squared error, and its gradient in the free numbers."""
    weights, decays = _parameters(free)
    lags = np.arange(workload.rounds - 1)
    powers = np.power.outer(decays, lags)
    c = np.concatenate([[1.0], weights @ powers])
    square, slope = workload.mean_square(c)
    sensitivity, steep = _sensitivity_square(c, separation, participations)
    gradient = (slope / square + steep / sensitivity)[1:]
    of_weights = powers @ gradient
    of_decays = weights / decays * ((powers * lags) @ gradient)
    portions = weights / decays
    of_portions = of_weights * decays
    of_shares = portions * (of_portions - portions @ of_portions)
    of_logits = (of_decays + of_weights * portions) * decays * (1 - decays)
    return math.log(square * sensitivity), np.concatenate([of_shares, of_logits])


def _sensitivity_square(c: np.ndarray, separation: int, participations: int) -> tuple[float, np.ndarray]:
    """The square of `participation_sensitivity` in floats, and its gradient."""
    firsts = range(0, len(c), separation)[:participations]
    column, gradient = np.zeros(len(c)), np.zeros(len(c))
    for first in firsts:
        column[first:] += c[: len(c) - first]
    for first in firsts:
        gradient[: len(c) - first] += 2 * column[first:]
    return float(column @ column), gradient
