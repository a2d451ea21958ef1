"""What the server's optimizer makes of the releases, and how much noise it makes of theirs.

Every optimizer here is linear in the releases: after round t the parameters have moved by Σ_{i≤t} w_{t,i}·release_i,
with

    w_{t,i} = Σ_{s=i..t} (1 − κ)^{t−s}·f_s·m^{s−i},

a geometric average of the releases (decay m) times a factor f_s of each round, summed over the rounds; training may
undo a share κ of what is there in each round. The release of round t carries the noise ‖c‖₂·x_t, x = C⁻¹ξ, with C the
lower-triangular Toeplitz matrix of the coefficients c and ξ standard normal; so ξ_j is in the parameters after round t
with weight B_{t,j} = Σ_{s=j..t} (1 − κ)^{t−s}·f_s·g_{s−j}, where g is the impulse response of 1/((1 − mz)·c(z)). The
mean over rounds of Σ_j B_{t,j}² is a quadratic form gᵀQg, whose entries are suffix sums along the diagonals:

    Q_{k,k+d} = (1/T) (1 − κ)^d Σ_{s=k..T−1−d} f_s·f_{s+d}·Σ_{u=0..T−1−d−s} (1 − κ)^{2u}.

Where f is constant, B is Toeplitz too: its first column is f·h, h the impulse response of 1/(1 − (1−κ)z) to g, and the
mean is (f²/T) Σ_k (T − k)·h_k². Nothing here is approximated, and nothing touches privacy: any workload gives a valid
mechanism, a fitting one a better.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import scipy

from fedsim.errors import InvalidInput
from fedsim.privacy.recursion import recursion
from fedsim.schedule import Schedule, schedule_factor
from fedsim.validation import require_at_least, require_between

ADAM_DECAYS = 0.9, 0.999
"""β₁ and β₂ of the server's Adam."""
ADAM_FORGETTING = 0.1
"""Its κ, where none is given: from 0.1 to 0.3, `error` ranks bands much as the losses of trained models do."""
MOST_ROUNDS_IN_MEMORY = 2500
"""Up to here Q is kept (48 MiB at most); beyond, its diagonals are made again for each set of coefficients."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How the parameters depend on the releases of the rounds so far.

    Attributes:
        factors: f_s, one a round: learning rate over its peak, and whatever else the optimizer multiplies with.
        decay: m, the decay of the optimizer's average of releases, 0 ≤ m < 1; 0 where it has none.
        forgetting: κ, the share of a displacement that training undoes in a round, 0 ≤ κ < 1: near a minimum of
            curvature λ, gradient steps at rate η pull noise back by ηλ. 0 for the displacement alone.
        second_decay: Decay of the average of squared releases whose root the optimizer divides by (Adam's β₂); 0 where
            it does not.
    """

    factors: tuple[float, ...]
    decay: float = 0.0
    forgetting: float = 0.0
    second_decay: float = 0.0

    def __post_init__(self) -> None:
        if not self.factors or not all(math.isfinite(factor) for factor in self.factors) or not any(self.factors):
            raise InvalidInput("factors", self.factors, "finite numbers, one a round, at least one of them not 0")
        for name in ("decay", "forgetting", "second_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidInput(name, getattr(self, name), "a number of at least 0 and below 1")

    @classmethod
    def prefix_sums(cls, rounds: int) -> Self:
        """Plain SGD at a constant learning rate: the parameters are the sum of the releases so far."""
        require_at_least("rounds", rounds, 1)
        return cls(factors=(1.0,) * rounds)

    @classmethod
    def of_optimizer(
        cls,
        name: Literal["sgd", "momentum", "adam"],
        rounds: int,
        *,
        momentum: float = 0.9,
        schedule: Schedule = "constant",
        warmup_rounds: int = 0,
        forgetting: float | None = None,
    ) -> Self:
        """What the server's optimizer of this name makes of the releases, at a peak learning rate of 1.

        Adam's first moment, with its bias correction, is f_s = η_s·(1 − β₁)/(1 − β₁^{s+1}), m = β₁. It divides by the
        root of a moving average of squared releases. Where noise outweighs the signal in each coordinate, as it does
        at user level, that average is the variance of the noise. Its scale is made up for by the learning rate, but
        its course is not: x_t has the variance Σ_{i≤t} β_i², 1 at first and several times more after a band, so that
        the more strongly noise is correlated, the larger are the first steps, noise and all, beside the rest. `error`
        counts that.

        Args:
            name: The update rule.
            rounds: T.
            momentum: Momentum of the momentum rule (m·buffer + release, no dampening).
            schedule: How the learning rate falls over the rounds.
            warmup_rounds: Rounds over which it rises from zero.
            forgetting: κ, what training undoes of a displacement in a round; by default 0.1 for adam, whose steps
                keep their size to the end, and 0 for the others.

        Raises:
            InvalidInput: For an unknown rule, or a value out of range.
        """
        require_at_least("rounds", rounds, 1)
        rates = [schedule_factor(schedule, warmup_rounds, done, rounds) for done in range(rounds)]
        if name == "sgd":
            return cls(factors=tuple(rates), forgetting=forgetting or 0.0)
        if name == "momentum":
            require_between("momentum", momentum, 0, 1)
            return cls(factors=tuple(rates), decay=momentum, forgetting=forgetting or 0.0)
        if name == "adam":
            first, second = ADAM_DECAYS
            corrected = tuple(rate * (1 - first) / (1 - first ** (done + 1)) for done, rate in enumerate(rates))
            kept = ADAM_FORGETTING if forgetting is None else forgetting
            return cls(factors=corrected, decay=first, forgetting=kept, second_decay=second)
        raise InvalidInput("optimizer.name", name, "sgd, momentum or adam")

    @property
    def rounds(self) -> int:
        """T."""
        return len(self.factors)

    @property
    def fits(self) -> tuple[Self, ...]:
        """Workloads without a second moment, whose best coefficients are candidates for this one's."""
        if not self.second_decay:
            return (self,)
        linear = replace(self, second_decay=0.0)
        sums = replace(linear, factors=(1.0,) * self.rounds, decay=0.0)
        return linear, replace(sums, forgetting=self.forgetting / 3), replace(sums, forgetting=0.0)

    def error(self, coefficients: Sequence[float] | np.ndarray) -> float:
        """The noise in the parameters for these coefficients, at noise multiplier, clip norm and divisor 1.

        Args:
            coefficients: c, at most T of them, c_0 ≠ 0.

        Returns:
            Root mean square over the rounds of the standard deviation, in one coordinate, of the noise in what the
            optimizer has made of the releases: √((T+1)/2) for prefix sums and c = (1,). Infinite where 1/c(z) grows
            past what a float64 holds. With a second moment, at the learning rate where a signal that is the same in
            all rounds gets as far as it gets with c = (1,), in root mean square over the rounds.
        """
        c = self._checked(coefficients)
        norm = float(np.linalg.norm(c))
        if not self.second_decay:
            return norm * math.sqrt(self.mean_square(c)[0])
        with np.errstate(over="ignore", invalid="ignore"):
            inverse = recursion(c, _impulse(self.rounds))
            factors = np.array(self.factors) / np.sqrt(self._second_moments(inverse))
            response = recursion([1.0, -self.decay], inverse)
            noise, square = np.zeros(self.rounds), 0.0
            for done, factor in enumerate(factors):
                noise *= 1 - self.forgetting
                noise[: done + 1] += factor * response[done::-1]
                square += float(noise @ noise)
        slower = self._progress(np.array(self.factors)) / self._progress(factors)
        error = norm * math.sqrt(square / self.rounds) * slower
        return error if math.isfinite(error) else math.inf

    def mean_square(self, coefficients: Sequence[float] | np.ndarray) -> tuple[float, np.ndarray]:
        """The mean over rounds of the variance that x = C⁻¹ξ has in the parameters, without the factor ‖c‖₂².

        A second moment is left out: the mean square is that of the first of `fits`.

        Returns:
            The mean square, and its gradient in the coefficients, float64 of their shape.

        Raises:
            InvalidInput: For no coefficients, more of them than rounds, or c_0 = 0.
        """
        c = self._checked(coefficients)
        with np.errstate(over="ignore", invalid="ignore"):
            inverse = recursion(c, _impulse(self.rounds))
            response = recursion([1.0, -self.decay], inverse)
            slope = self._form(response)
            square = float(response @ slope)
            # c·β = 1, so that dg = −(g∗β)∗dc.
            moved = recursion(c, response)
            gradient = np.array([slope[lag:] @ moved[: self.rounds - lag] for lag in range(len(c))])
        return (square if math.isfinite(square) else math.inf), -2 * gradient

    def _checked(self, coefficients: Sequence[float] | np.ndarray) -> np.ndarray:
        c = np.asarray(coefficients, dtype=np.float64)
        if c.ndim != 1 or not 1 <= len(c) <= self.rounds or c[0] == 0:
            allowed = f"between 1 and {self.rounds} numbers (the rounds), the first of them not 0"
            raise InvalidInput("coefficients", coefficients, allowed)
        return c

    def _second_moments(self, inverse: np.ndarray) -> np.ndarray:
        """The bias-corrected average of the variances of x so far, float64 [T]; 1 in all rounds for c = (1,)."""
        decay = self.second_decay
        average: np.ndarray = recursion([1.0, -decay], (1 - decay) * np.cumsum(inverse**2))
        corrected: np.ndarray = average / (1 - decay ** np.arange(1, self.rounds + 1))
        return corrected

    def _progress(self, factors: np.ndarray) -> float:
        """Root mean square over the rounds of where a signal of 1 in each round has moved the parameters."""
        averages = recursion([1.0, -self.decay], np.ones(self.rounds))
        moved = recursion([1.0, self.forgetting - 1], factors * averages)
        return math.sqrt(float(np.mean(moved**2)))

    def _form(self, response: np.ndarray) -> np.ndarray:
        """Q·response, float64 [T]."""
        if min(self.factors) == max(self.factors):
            kept = [1.0, self.forgetting - 1]
            left = np.arange(self.rounds, 0, -1) * (self.factors[0] ** 2 / self.rounds)
            slope: np.ndarray = recursion(kept, (left * recursion(kept, response))[::-1])[::-1]
            return slope
        if self.rounds <= MOST_ROUNDS_IN_MEMORY:
            product: np.ndarray = scipy.linalg.blas.dsymv(
                1.0, _quadratic_form(self.factors, self.forgetting).T, response
            )
            return product
        product = np.zeros(self.rounds)
        for distance, diagonal in _diagonals(self.factors, self.forgetting):
            product[: len(diagonal)] += diagonal * response[distance:]
            if distance:
                product[distance:] += diagonal * response[: len(diagonal)]
        return product


def release_noise(coefficients: Sequence[float] | np.ndarray, rounds: int) -> float:
    """The noise of a single release, ‖c‖₂·x_t, at noise multiplier 1: root mean square over the rounds.

    Correlated noise is small in sums and large in each release. An optimizer that divides by the size of releases, as
    Adam does, takes smaller steps by this factor, times the growth of σ, unless its learning rate grows by as much.
    """
    inverse = recursion(np.asarray(coefficients, dtype=np.float64), _impulse(rounds))
    return float(np.linalg.norm(coefficients) * math.sqrt(np.cumsum(inverse**2).mean()))


def summed_noise(coefficients: Sequence[float] | np.ndarray, rounds: int) -> float:
    """Standard deviation of the noise in the sum of all rounds, at noise multiplier 1: √rounds for (1,)."""
    inverse = recursion(np.asarray(coefficients, dtype=np.float64), _impulse(rounds))
    return float(np.linalg.norm(coefficients) * np.linalg.norm(np.cumsum(inverse)))


def _impulse(rounds: int) -> np.ndarray:
    impulse: np.ndarray = np.zeros(rounds)
    impulse[0] = 1.0
    return impulse


@functools.lru_cache(maxsize=2)
def _quadratic_form(factors: tuple[float, ...], forgetting: float) -> np.ndarray:
    """Q, float64 [T, T]; the last are kept, because coefficients of many lengths are fitted to one workload."""
    rounds = len(factors)
    form = np.empty((rounds, rounds))
    entries = form.reshape(-1)
    for distance, diagonal in _diagonals(factors, forgetting):
        length = len(diagonal)
        entries[distance : distance + length * (rounds + 1) : rounds + 1][:length] = diagonal
        entries[distance * rounds :: rounds + 1] = diagonal
    return form


def _diagonals(factors: tuple[float, ...], forgetting: float) -> Iterator[tuple[int, np.ndarray]]:
    """The distance of each diagonal of Q from the main one, and its entries from k = 0 on."""
    values, rounds = np.array(factors), len(factors)
    remaining = np.cumsum((1 - forgetting) ** (2 * np.arange(rounds)))[::-1] / rounds
    for distance in range(rounds):
        products = values[: rounds - distance] * values[distance:] * remaining[distance:]
        yield distance, np.cumsum(products[::-1])[::-1] * (1 - forgetting) ** distance
