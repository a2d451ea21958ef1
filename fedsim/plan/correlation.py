"""How a plan's noise depends on that of earlier rounds: over a band of them, or through buffers over all."""

from dataclasses import dataclass

import numpy as np

from fedsim.privacy.mechanisms.banded.blt import BufferedToeplitz
from fedsim.privacy.mechanisms.banded.coefficients import norm_above
from fedsim.privacy.mechanisms.banded.mechanism import correlation_in_words
from fedsim.privacy.mechanisms.banded.workload import summed_noise
from fedsim.sampling import Sampling


@dataclass(frozen=True)
class Correlation:
    """Noise that is correlated over rounds.

    Attributes:
        coefficients: c of banded noise; (1.0,) where it has buffers.
        buffered: The noise that has buffers, or None.
        norm: How many times as strong fresh noise is as independent noise, so that each participation of a user costs
            what the noise multiplier costs.
    """

    coefficients: tuple[float, ...]
    buffered: BufferedToeplitz | None
    norm: float

    def coefficients_of(self, rounds: int) -> np.ndarray:
        """c of a chain of so many rounds, float64: of as many as there are bands, or with buffers of all."""
        return np.array(self.coefficients) if self.buffered is None else self.buffered.coefficients(rounds)

    def summed_noise(self, rounds: int) -> float:
        """Standard deviation of the noise in the sum of so many rounds, at noise multiplier 1."""
        c = self.coefficients_of(rounds)
        return summed_noise(c, rounds) * self.norm / float(np.linalg.norm(c))

    def in_words(self) -> str:
        """What it is beside independent noise, as an addition to a sentence that says which noise is added."""
        if self.buffered is not None:
            return self.buffered.in_words(self.norm)
        return correlation_in_words(self.coefficients)


def correlation_of(
    coefficients: tuple[float, ...], buffers: tuple[tuple[float, float], ...], scheme: Sampling, steps: int
) -> Correlation | None:
    """The correlation of a plan's noise; None where it is independent.

    Args:
        coefficients: c, as the plan has it.
        buffers: (weight, decay) of each buffer.
        scheme: How units join a round, with nothing left open.
        steps: T.
    """
    if buffers:
        buffered = BufferedToeplitz.of_pairs(buffers)
        apart = scheme.separation
        return Correlation(coefficients, buffered, buffered.norm(apart, -(-steps // apart)))
    return Correlation(coefficients, None, norm_above(coefficients)) if len(coefficients) > 1 else None
