"""Gaussian noise from a cryptographic generator, on a public grid.

Floating-point noise has two weaknesses. Its low-order bits tell sums apart that the noise should make alike (Mironov
2012, "On significance of the least significant bits for differential privacy"), and a statistical generator can be
predicted from what it has put out. Here the keys of each release come from the operating system and are forgotten,
the bits come from AES-256 in counter mode, and what is added is floor(Z/h) for an exact Gaussian Z and a grid step h:
for a sum that lies on the grid, S + h·floor(Z/h) = h·floor((S + Z)/h), which is a function of the continuous Gaussian
mechanism's output. By post-processing its guarantee holds as it stands, without a new accountant.

Z/σ = ±(k + x) is drawn as by Karney (2016, "Sampling exactly from the normal distribution", Algorithm N): integer k
with probability ∝ exp(−k²/2), x uniform on (0, 1), kept with probability exp(−x(2k + x)/2). x has 128 bits, k's table
too, and where float64 cannot decide whether x is kept, more digits do. What is left is below 2^-60 of the probability
of each grid point.
"""

import decimal
import functools
import math
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Protocol

import numpy as np

from fedsim.errors import InvalidInput

CHUNK = 1 << 18
"""Coordinates whose noise is drawn at once."""
STEPS = 32
"""The grid has at least 2^32 steps in a standard deviation."""
SCALE_BITS = 26
"""Bits of the standard deviation over the grid step: it is rounded up, by less than 2^-25 of itself."""
UNDECIDED = 2.0**-45
"""Nearer to float64's acceptance probability than this, more digits decide. The probability's error is below 2^-48."""
LARGEST_PART = 16

decimal_context = decimal.Context(prec=80)


_Scale = tuple[int, int]
"""numerator·2^exponent: a standard deviation in steps of the grid."""


class Bits(Protocol):
    """A source of independent uniform 64-bit words."""

    def words(self, count: int) -> np.ndarray:
        """uint64 [count]."""


class CryptographicBits:
    """AES-256 in counter mode under a key from the operating system that is kept nowhere else."""

    def __init__(self) -> None:
        # Here, because noise from a seed does without.
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        self._stream = Cipher(algorithms.AES(secrets.token_bytes(32)), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> np.ndarray:
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64)


class SecureNoise:
    """Adds the noise of one release.

    Args:
        resolution: Step of the grid that the sums lie on, a power of two (`fedsim.engine.exact`; ½ for a count of
            halves). 0 for float sums, which are rounded to the grid first; their own rounding is not covered then.
        bits: Where randomness comes from; by default each piece of CHUNK coordinates has a key of its own.
        threads: How many may draw ahead at the same time, where each piece has its own key.
    """

    def __init__(self, resolution: float = 0.0, bits: Bits | None = None, *, threads: int = 1) -> None:
        self.resolution = resolution
        self._given = bits
        self._threads = threads if bits is None else 1
        self._ahead: deque[tuple[_Scale, np.ndarray]] = deque()

    def grid_step(self, std: float) -> float:
        """The grid that values noised at this deviation lie on: a power of two that public values alone decide."""
        step = math.ldexp(1.0, math.frexp(std)[1] - 1 - STEPS)
        return min(step, self.resolution) if self.resolution else step

    def generator(self) -> np.random.Generator:
        """There is none: only Gaussian noise is drawn exactly.

        Raises:
            InvalidInput: Always.
        """
        raise InvalidInput("noise.secure", True, "off with a mechanism whose noise is not Gaussian")

    def normal_steps(self, size: int, bits: int) -> np.ndarray:
        """floor(Z·2^bits) for exact standard normal Z, int64 [size]; bits from 26 to 57."""
        return self._drawn(size, (1 << (SCALE_BITS - 1), bits - SCALE_BITS + 1))

    def add_normal(self, total: np.ndarray, std: float) -> None:
        """total + N(0, std²) on the grid, in place.

        Args:
            total: float32 or float64 [P].
            std: Standard deviation, positive; what is added has at least that, and less than 2^-25 of it more.

        Raises:
            ValueError: The total is too long, or the deviation too large, for the grid.
        """
        step = self.grid_step(std)
        scale = _rounded_up(std / step)
        for start in range(0, len(total), CHUNK):
            part = total[start : start + CHUNK]
            # Division by a power of two is exact, and where the sum lies on the grid so is rounding.
            places = np.rint(part.astype(np.float64) / step)
            if not np.abs(places).max(initial=0.0) < 2.0**61:
                raise ValueError("the sum is too long for the grid of secure noise")
            noised = places.astype(np.int64) + self._steps(len(part), scale)
            part[:] = noised.astype(np.float64) * step

    def draw_ahead(self, normals: Sequence[tuple[int, float]], dtype: type[np.generic], most: int) -> Iterator[None]:
        """Draw for later calls of add_normal, some pieces at a time.

        Args:
            normals: How many coordinates each call will be for, and the standard deviation.
            dtype: Of their totals; steps of the grid are int64 whatever it is.
            most: Bytes to use at most: eight a coordinate. What is beyond is drawn when it is added.

        Raises:
            ValueError: A deviation is too large, or too small, for the grid; before anything is drawn.
        """
        scales = [(count, _rounded_up(std / self.grid_step(std))) for count, std in normals]
        pieces = [(min(CHUNK, count - start), scale) for count, scale in scales for start in range(0, count, CHUNK)]
        within = sum(total <= most for total in accumulate(8 * size for size, _ in pieces))
        with ThreadPoolExecutor(self._threads) as pool:
            for start in range(0, within, self._threads):
                together = pieces[start : min(start + self._threads, within)]
                # A thread takes longer to begin than a small model's one piece to be drawn.
                draw = pool.map if len(together) > 1 else map
                drawn = draw(lambda piece: self._drawn(*piece), together)
                self._ahead.extend((scale, steps) for (_, scale), steps in zip(together, drawn, strict=True))
                if start + self._threads < within:
                    yield

    def _drawn(self, size: int, scale: _Scale) -> np.ndarray:
        """Fresh noise of one piece, in steps of the grid."""
        return floor_normal(CryptographicBits() if self._given is None else self._given, size, *scale)

    def _steps(self, size: int, scale: _Scale) -> np.ndarray:
        """Noise of so many coordinates in steps of the grid: what was drawn ahead for them, or else fresh."""
        if self._ahead:
            drawn_for, drawn = self._ahead.popleft()
            if drawn_for == scale and len(drawn) == size:
                return drawn
            self._ahead.clear()  # drawn for something else
        return self._drawn(size, scale)


def floor_normal(bits: Bits, size: int, numerator: int, exponent: int) -> np.ndarray:
    """floor(Z·s) for exact standard normal Z and s = numerator·2^exponent.

    Args:
        bits: Uniform words.
        size: How many.
        numerator: Below 2^27.
        exponent: 0 to 32.

    Returns:
        int64 [size].
    """
    k, high = _halves(bits, size)
    low = bits.words(size)
    magnitude = _scaled_floor(k, high, low, numerator, exponent)
    negative = np.unpackbits(bits.words((size + 63) // 64).view(np.uint8), count=size).astype(bool)
    # floor(−y) = −floor(y) − 1 for every y that is no integer, which is all of them.
    return np.where(negative, -magnitude - 1, magnitude)


def _rounded_up(scale: float) -> _Scale:
    """scale, of at least 2^26, as numerator·2^exponent, not less, with a numerator of SCALE_BITS bits."""
    exponent = math.frexp(scale)[1] - SCALE_BITS
    if not 0 <= exponent <= 32:
        raise ValueError(f"a standard deviation of {scale:g} grid steps is outside what secure noise can draw")
    return math.ceil(math.ldexp(scale, -exponent)), exponent


def _halves(bits: Bits, size: int) -> tuple[np.ndarray, np.ndarray]:
    """size accepted pairs (k, the first 64 bits of x): |Z| = k + x."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    missing = size
    while missing > 0:
        tries = missing + missing // 2 + 16  # 71 % are kept.
        words = bits.words(3 * tries)
        k = _whole_parts(words[:tries], bits)
        kept = _accepted(k, words[tries : 2 * tries], words[2 * tries :], bits)[:missing]
        parts.append((k[kept], words[tries : 2 * tries][kept]))
        missing -= len(kept)
    nothing = np.zeros(0, dtype=np.uint64)
    whole, first = zip((nothing, nothing), *parts, strict=True)
    return np.concatenate(whole), np.concatenate(first)


def _whole_parts(words: np.ndarray, bits: Bits) -> np.ndarray:
    """k with probability ∝ exp(−k²/2), by inverting its distribution at 128 bits; uint64."""
    k = np.searchsorted(_TABLE_HIGH, words, side="right")
    # The first 64 bits equal a threshold's once in 2^60 draws; then the next 64 decide.
    for place in np.flatnonzero(np.isin(words, _TABLE_HIGH)):
        below = int(np.searchsorted(_TABLE_HIGH, words[place]))
        lows = _TABLE_LOW[below : int(k[place])]
        k[place] = below + int(np.searchsorted(lows, bits.words(1)[0], side="right"))
    return k.astype(np.uint64)


def _accepted(k: np.ndarray, x: np.ndarray, uniform: np.ndarray, bits: Bits) -> np.ndarray:
    """Places where the uniform is below exp(−x(2k + x)/2)."""
    fraction = x * 2.0**-64
    probability = np.exp(-0.5 * fraction * (2.0 * k + fraction))
    gap = probability - uniform * 2.0**-64
    kept = gap > 0
    for place in np.flatnonzero(np.abs(gap) < UNDECIDED):
        kept[place] = _accepted_exactly(int(k[place]), int(x[place]), int(uniform[place]), bits)
    return np.flatnonzero(kept)


def _accepted_exactly(k: int, x: int, uniform: int, bits: Bits) -> bool:
    """The same with 80 digits, and 128 bits of the uniform. x's bits beyond 64 move the threshold by 2^-64 at most."""
    context = decimal_context
    fraction = context.divide(decimal.Decimal(2 * x + 1), decimal.Decimal(2**65))
    power = context.multiply(fraction, context.add(decimal.Decimal(2 * k), fraction))
    threshold = context.exp(context.divide(power, decimal.Decimal(-2)))
    wide = (uniform << 64) + int(bits.words(1)[0])
    return context.divide(decimal.Decimal(wide), decimal.Decimal(2**128)) < threshold


def _scaled_floor(k: np.ndarray, high: np.ndarray, low: np.ndarray, numerator: int, exponent: int) -> np.ndarray:
    """floor((k + x)·numerator·2^exponent), x of 128 bits, in limbs of 32 bits; int64."""
    factor, mask, half = np.uint64(numerator), np.uint64(0xFFFFFFFF), np.uint64(32)
    carry = np.zeros(len(k), dtype=np.uint64)
    for limb in (low & mask, low >> half, high & mask, high >> half):
        carry = limb * factor + (carry >> half)
    # carry is now floor(x·numerator·2^32), below 2^59.
    whole = (k * factor) << np.uint64(exponent)
    return (whole + (carry >> np.uint64(32 - exponent))).astype(np.int64)


def _table() -> tuple[np.ndarray, np.ndarray]:
    """P(k ≤ j) for j = 0, 1, …, in 128 bits: the first and the last 64."""
    context = decimal_context
    weights = [context.exp(decimal.Decimal(-k * k) / 2) for k in range(LARGEST_PART)]
    whole, below, thresholds = functools.reduce(context.add, weights), decimal.Decimal(0), []
    for weight in weights[:-1]:
        below = context.add(below, weight)
        thresholds.append(int(context.multiply(context.divide(below, whole), decimal.Decimal(2**128)).to_integral()))
    # Beyond k = 13 less than 2^-128 is left.
    thresholds = [threshold for threshold in thresholds if threshold < 2**128]
    high = np.array([threshold >> 64 for threshold in thresholds], dtype=np.uint64)
    return high, np.array([threshold & (2**64 - 1) for threshold in thresholds], dtype=np.uint64)


_TABLE_HIGH, _TABLE_LOW = _table()
