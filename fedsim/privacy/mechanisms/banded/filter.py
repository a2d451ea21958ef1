"""Noise correlated over rounds: x_t = ξ_t − Σ c_j·x_{t−j}, times ‖c‖₂, in place of ξ_t.

What training uses are sums of releases over rounds; in them this noise cancels in part. Together the rounds release
C·sums + σ‖c‖₂·ξ, C the banded Toeplitz matrix of c, from which the releases follow: Gaussian noise on columns of norm
‖c‖₂. So each participation of a user costs what σ costs, where two of them are at least a band apart.

What was drawn in earlier rounds must be known for the next: it hides what those released, and is as secret as they.
"""

import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from fedsim.errors import Failure, InvalidInput
from fedsim.privacy.mechanisms.banded.blt import BufferedToeplitz
from fedsim.privacy.mechanisms.banded.coefficients import norm_above
from fedsim.privacy.mechanisms.noise import NoiseSource
from fedsim.randomness import StreamNoise
from fedsim.secure_noise import SecureNoise

CHUNK = 1 << 18
"""Coordinates whose noise is computed at once."""
IN_MEMORY = 1 << 30
"""Bytes of earlier rounds' noise beyond which they lie in an unnamed file on disk, in the folder for such (TMPDIR)."""
FINE_BITS, COARSE_BITS = 52, 32
"""Secure noise: ξ lies on the grid 2⁻⁵², sums and x on 2⁻³², coefficients on 2⁻²⁰, so that c·x lies on 2⁻⁵² too."""
COEFFICIENT_BITS = FINE_BITS - COARSE_BITS


class NoiseFilter(ABC):
    """The noise of one chain of rounds, in order and without gaps.

    Args:
        norm: How many times as strong fresh noise is as independent noise.
        kept: Vectors that are kept of earlier rounds' noise.
        size: Values of a sum.
        dtype: Of one value of such a vector.
    """

    def __init__(self, norm: float, kept: int, size: int, dtype: type[np.generic]) -> None:
        self.size = size
        self.rounds = 0
        self.norm = norm
        self.past = _zeros(kept, size, dtype)

    def restart(self) -> None:
        """Begin a new chain, which shares nothing with the one before."""
        self.rounds = 0
        self.past[:] = 0

    def correlated(self, source: NoiseSource) -> "CorrelatedNoise":
        """The noise of the chain's next round, made from fresh noise of that source."""
        return CorrelatedNoise(self, source)

    @abstractmethod
    def following(self, source: NoiseSource, start: int, stop: int) -> np.ndarray:
        """Draw x_t on these coordinates, as it is kept: of past's dtype, and not kept yet."""

    def keep(self, start: int, drawn: np.ndarray) -> None:
        """Make x_t, on the coordinates from start on, the noise of the chain's next round."""
        self.past[self.rounds % len(self.past), start : start + len(drawn)] = drawn

    def draw_ahead(self, source: NoiseSource, most: int) -> Iterator[np.ndarray | None]:
        """x_t from the first coordinate on, piece by piece, none of it kept; no more than so many bytes."""
        for start in range(0, self.size, CHUNK):
            stop = min(start + CHUNK, self.size)
            if stop * self.past.dtype.itemsize > most:
                return
            yield self.following(source, start, stop)

    @abstractmethod
    def add(self, part: np.ndarray, drawn: np.ndarray, std: float) -> None:
        """part + std·norm·x, in place."""


class CorrelatedNoise:
    """One round's noise, as a source: what a mechanism adds from the first coordinate to the last.

    Args:
        chain: The chain that it continues.
        source: Where fresh noise comes from.
    """

    def __init__(self, chain: NoiseFilter, source: NoiseSource) -> None:
        self._chain, self._source = chain, source
        self._place = 0
        self._ahead: deque[np.ndarray] = deque()

    def add_normal(self, total: np.ndarray, std: float) -> None:
        """Add noise of standard deviation std·norm·√E[x²] to the next values of the sum, in place."""
        start = 0
        while start < len(total):
            drawn = self._next(min(CHUNK, len(total) - start))
            self._chain.add(total[start : start + len(drawn)], drawn, std)
            start += len(drawn)

    def draw_ahead(self, normals: Sequence[tuple[int, float]], dtype: type[np.generic], most: int) -> Iterator[None]:
        """Draw the round's noise for later calls of add_normal, piece by piece, as far as the filter permits.

        Until these calls nothing of the chain has changed. See `StreamNoise.draw_ahead`.
        """
        for drawn in self._chain.draw_ahead(self._source, most):
            if drawn is not None:
                self._ahead.append(drawn)
            yield

    def generator(self) -> np.random.Generator:
        """There is none: only Gaussian noise can be correlated.

        Raises:
            InvalidInput: Always.
        """
        raise InvalidInput("plan.bands", "correlated noise", "1 with noise that is not Gaussian")

    def finish(self, *, draw: bool = False) -> None:
        """End the round.

        Args:
            draw: Draw what has not been drawn, for a round that was released before; otherwise everything must have
                been.

        Raises:
            Failure: Some values got no noise, or more than once: nothing of the round may be released.
        """
        while draw and self._place < self._chain.size:
            self._next(min(CHUNK, self._chain.size - self._place))
        if self._place != self._chain.size:
            raise Failure(f"{self._place} of {self._chain.size} values of a sum got correlated noise")
        self._chain.rounds += 1

    def _next(self, count: int) -> np.ndarray:
        """The next values of x_t, kept: so many of them, or fewer."""
        if self._ahead:
            drawn = self._ahead.popleft()
            if len(drawn) > count:
                self._ahead.appendleft(drawn[count:])
                drawn = drawn[:count]
        else:
            drawn = self._chain.following(self._source, self._place, self._place + count)
        self._chain.keep(self._place, drawn)
        self._place += len(drawn)
        return drawn


class FloatNoise(NoiseFilter):
    """In floating point, from a pseudo-random stream."""

    def _fresh(self, source: NoiseSource, count: int) -> np.ndarray:
        """ξ of so many values, as past noise is kept."""
        drawn = np.zeros(count, dtype=self.past.dtype)
        source.add_normal(drawn, 1.0)
        return drawn

    def add(self, part: np.ndarray, drawn: np.ndarray, std: float) -> None:
        part += part.dtype.type(std * self.norm) * drawn.astype(part.dtype, copy=False)


class FloatFilter(FloatNoise):
    """Banded noise in floating point.

    Args:
        coefficients: c, of at least two bands.
        size: Values of a sum.
        wide: Whether sums are float64, as exact ones are.
    """

    def __init__(self, coefficients: tuple[float, ...], size: int, *, wide: bool = False) -> None:
        dtype = np.float64 if wide else np.float32
        super().__init__(norm_above(coefficients), len(coefficients) - 1, size, dtype)
        self.coefficients = coefficients

    def following(self, source: NoiseSource, start: int, stop: int) -> np.ndarray:
        drawn, rows = self._fresh(source, stop - start), len(self.past)
        # Value by value, so that the bits do not depend on which values are computed together.
        for lag, coefficient in enumerate(self.coefficients[1:], start=1):
            drawn -= self.past.dtype.type(coefficient) * self.past[(self.rounds - lag) % rows, start:stop]
        return drawn


class BufferFilter(FloatNoise):
    """Buffered noise in floating point: correlated over all rounds.

    Args:
        noise: Weights and decays of the buffers.
        norm: As `BufferedToeplitz.norm` gives it.
        size: Values of a sum.
        wide: Whether sums are float64, as exact ones are.
    """

    def __init__(self, noise: BufferedToeplitz, norm: float, size: int, *, wide: bool = False) -> None:
        super().__init__(norm, len(noise.decays), size, np.float64 if wide else np.float32)
        self.noise = noise

    def following(self, source: NoiseSource, start: int, stop: int) -> np.ndarray:
        return self.noise.correlate(self._fresh(source, stop - start), self.past[:, start:stop])

    def keep(self, start: int, drawn: np.ndarray) -> None:
        """Nothing: buffers are what is kept, and `following` moved them on."""

    def draw_ahead(self, source: NoiseSource, most: int) -> Iterator[np.ndarray | None]:
        """Fresh noise alone: buffers are changed where they lie, and must stay as they are until the round's noise is
        added."""
        if isinstance(source, StreamNoise):
            yield from source.draw_ahead([(self.size, 1.0)], self.past.dtype.type, most)


class GridFilter(NoiseFilter):
    """In integers, from a cryptographic source: the release is a function of a continuous Gaussian mechanism's output.

    In units of the noise let g be a sum rounded to the coarse grid, and n the noise that was added to it. With
    y_t = g_t + R(⌊ξ_t⌋ − Σ c_j·n_{t−j}), ⌊⌋ down to the fine grid and R to the nearest point of the coarse one,

        y_t = R(⌊(C·g)_t + ξ_t⌋ − Σ c_j·y_{t−j}),

    since (C·g)_t lies on the fine grid and g_t on the coarse one: y follows from what the Gaussian mechanism on C·g
    puts out, whatever follows from y. Rounding moves each value of two users' sums apart by at most a coarse step, so
    the sensitivity grows by √P steps, which the noise is enlarged for.

    Args:
        coefficients: c, multiples of 2⁻²⁰.
        size: Values of a sum, P.
        noise_multiplier: σ: noise over sensitivity, before the enlargement.

    Raises:
        InvalidInput: For coefficients that are not on the grid.
    """

    def __init__(self, coefficients: tuple[float, ...], size: int, noise_multiplier: float) -> None:
        super().__init__(norm_above(coefficients), len(coefficients) - 1, size, np.int64)
        self._steps = np.array([round(c * 2**COEFFICIENT_BITS) for c in coefficients], dtype=np.int64)
        if any(step != c * 2**COEFFICIENT_BITS for step, c in zip(self._steps, coefficients, strict=True)):
            raise InvalidInput("noise_coefficients", coefficients, "multiples of 2^-20 with secure noise")
        self._limit = 2.0**62 / float(np.abs(self._steps).sum())
        if not noise_multiplier * self.norm * np.sqrt(size) < 2.0 ** (COARSE_BITS - 2):
            raise InvalidInput("plan.noise-multiplier", noise_multiplier, "smaller, for the grid of secure noise")
        # Twice the step, for the rounding of the division before it, which is below a step for sums within the limit.
        self.enlarged = 1 + 2 * 2.0**-COARSE_BITS * np.sqrt(size) * noise_multiplier * self.norm

    def following(self, source: NoiseSource, start: int, stop: int) -> np.ndarray:
        if not isinstance(source, SecureNoise):
            raise InvalidInput("noise.secure", False, "a cryptographic source, which this noise is made for")
        drawn = source.normal_steps(stop - start, FINE_BITS)
        for lag, step in enumerate(self._steps[1:], start=1):
            earlier = self.past[(self.rounds - lag) % len(self.past), start:stop]
            if float(np.abs(earlier).max(initial=0)) >= self._limit:
                raise Failure("correlated noise is beyond what its grid holds")
            drawn -= step * earlier
        drawn += 1 << (COEFFICIENT_BITS - 1)
        drawn >>= COEFFICIENT_BITS
        return drawn

    def latest(self) -> np.ndarray:
        """What the last round drew, int64 [P]."""
        latest: np.ndarray = self.past[(self.rounds - 1) % len(self.past)]
        return latest

    def take(self, drawn: np.ndarray) -> None:
        """Continue the chain by a round that drew this, as latest() returned it."""
        self.past[self.rounds % len(self.past)] = drawn
        self.rounds += 1

    def load(self, past: np.ndarray, rounds: int) -> None:
        """Continue a chain of so many rounds that left this."""
        self.past[:] = past
        self.rounds = rounds

    def add(self, part: np.ndarray, drawn: np.ndarray, std: float) -> None:
        step = std * self.norm * self.enlarged * 2.0**-COARSE_BITS
        places = np.rint(part.astype(np.float64) / step)
        if not np.abs(places).max(initial=0.0) < 2.0**52:
            raise Failure("the sum is too long for the grid of secure noise")
        part[:] = (places.astype(np.int64) + drawn).astype(np.float64) * step


def _zeros(rows: int, columns: int, dtype: type[np.generic]) -> np.ndarray:
    """An array of zeros, in memory or, where it is large, in a file that vanishes with it."""
    if rows * columns * np.dtype(dtype).itemsize <= IN_MEMORY:
        return np.zeros((rows, columns), dtype=dtype)
    with tempfile.TemporaryFile(prefix="fedsim-noise-") as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=(rows, columns))
