"""Keyed counter-based random streams: one per purpose and place, so that no stream is ever used twice."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Self

import numpy as np

BLOCK = 1 << 16
"""Coordinates of a release's noise that one place of the counter stands for: 256 KiB of float32 stay in cache."""
PIECE = 64 * BLOCK
"""Coordinates that are drawn ahead at once, between two looks whether they are still wanted."""
SEED_BITS = 62
"""Bits of a derived seed: what every message and configuration file carries."""


def derived_seed(seed: int, purpose: str, setting: str) -> int:
    """A seed of its own for one of several runs that are all begun with one number.

    Runs whose models are accounted for together must be independent, so no two of them may share a seed. The same
    run has the same seed whatever others are run beside it, now or later.

    Args:
        seed: The number that all were begun with.
        purpose: What the seed is for ("sampling", "noise").
        setting: What tells this run from every other, as text.

    Returns:
        At least 0 and below 2^SEED_BITS: BLAKE2b of purpose and setting under the number as a key.
    """
    return int.from_bytes(_digest(seed, json.dumps([purpose, setting]))) >> (128 - SEED_BITS)


def stream(seed: int | bytes, purpose: str, *place: int) -> np.random.Generator:
    """A generator that depends on (seed, purpose, place) alone.

    Two calls with the same arguments draw the same numbers, on any machine and in any order; calls that differ
    in any argument draw independently. A resumed run therefore draws what the uninterrupted run would have drawn.

    Args:
        seed: The run's seed for this kind of randomness, or secret key bytes.
        purpose: What the stream is for ("cohort", "rows", "noise", …).
        place: Integers that tell apart the uses of one purpose (round, user, …).

    Returns:
        A numpy Generator over Philox-4x64, keyed by BLAKE2b of the arguments (Salmon et al. 2011).
    """
    digest = _digest(seed, json.dumps([purpose, *map(int, place)]))
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _digest(seed: int | bytes, text: str, size: int = 16) -> bytes:
    """So many bytes that depend on seed and text alone."""
    secret = seed if isinstance(seed, bytes) else str(int(seed)).encode()
    key = hashlib.blake2b(secret, digest_size=32).digest()
    return hashlib.blake2b(text.encode(), key=key, digest_size=size).digest()


class StreamNoise:
    """Noise of one release from a counter-based generator, in floating point.

    What a coordinate gets depends on (seed, purpose, place), on the coordinate's number, and on whether it is drawn in
    float32 or float64: on nothing else. Any part of the vector can be drawn alone, and by any number of threads.
    Coordinates come in blocks of BLOCK, each from Philox-4x64 (Salmon et al. 2011) by numpy's ziggurat. Of 256 bits of
    BLAKE2b of the arguments 128 are its key and 128 the upper half of its counter; the block's number is the quarter
    below, and within a block 2^64 values of the counter are more than it can use up. No two blocks of a release share
    a value of the counter, and no two releases a key.

    Args:
        seed: The run's noise seed, or secret key bytes.
        purpose: What the noise is for; another draws independently.
        place: Integers that tell apart the uses of one purpose (round, attempt).
        threads: How many may draw at the same time.
    """

    def __init__(self, seed: int | bytes, purpose: str, *place: int, threads: int = 1) -> None:
        self._seed, self._purpose, self._place = seed, purpose, place
        self._take(self.key(seed, purpose, *place))
        self._threads = threads
        self._next = 0
        self._ahead = np.zeros(0, dtype=np.float32)
        self._other: np.random.Generator | None = None

    @staticmethod
    def key(seed: int | bytes, purpose: str, *place: int) -> bytes:
        """What tells the noise of one release, and of no other: 32 bytes, from which nobody finds the seed."""
        return _digest(seed, json.dumps(["normal", purpose, *map(int, place)]), 32)

    @classmethod
    def from_key(cls, key: bytes, first: int = 0, threads: int = 1) -> Self:
        """The same noise for whoever knows its key alone.

        Args:
            key: What key() returned.
            first: The coordinate that the first call of add_normal begins with.
            threads: How many may draw at the same time.
        """
        noise = cls(key, "of a key", threads=threads)  # its generator() draws other laws from a stream of its own
        noise._take(key)
        noise._next = first
        return noise

    def _take(self, key: bytes) -> None:
        self._key = int.from_bytes(key[:16], "little")
        self._counter = int.from_bytes(key[16:], "little") << 128

    def add_normal(self, total: np.ndarray, std: float) -> None:
        """Add N(0, std²) to every value of total, float32 or float64, in place and in its own precision.

        The first call is for the first coordinates of the vector, each further one for those that follow.
        """
        scale, first = total.dtype.type(std), self._next
        ahead = self._ahead if self._ahead.dtype == total.dtype else self._ahead[:0]

        def add(start: int, stop: int) -> None:
            drawn = ahead[start:stop] if stop <= len(ahead) else self._drawn(start, stop, total.dtype)
            drawn *= scale
            total[start - first : stop - first] += drawn

        self._next += len(total)
        self._in_blocks(first, self._next, add, 1 if self._next <= len(ahead) else self._threads)

    def fill(self, out: np.ndarray, start: int = 0) -> None:
        """Write N(0, 1) of the coordinates from start on into out, float32 or float64."""

        def draw(begin: int, end: int) -> None:
            part = out[begin - start : end - start]
            if begin % BLOCK:
                part[:] = self._drawn(begin, end, out.dtype)
            else:
                self._generator(begin // BLOCK).standard_normal(dtype=out.dtype, out=part)

        self._in_blocks(start, start + len(out), draw, self._threads)

    def draw_ahead(self, normals: Sequence[tuple[int, float]], dtype: type[np.generic], most: int) -> Iterator[None]:
        """Draw for later calls of add_normal, piece by piece; they add the same bits as without.

        Args:
            normals: How many coordinates each call will be for, and the standard deviation.
            dtype: Of their totals.
            most: Bytes to use at most: the noise of one release takes as many as its sum. What is beyond is drawn when
                it is added.
        """
        size = min(sum(count for count, _ in normals), most // np.dtype(dtype).itemsize // BLOCK * BLOCK)
        self._ahead = np.empty(size, dtype=dtype)
        places = [0, *range(BLOCK, size, PIECE), size]  # the first is short: it shows that drawing works
        for start, stop in pairwise(places):
            self.fill(self._ahead[start:stop], start)
            if stop < size:
                yield

    def generator(self) -> np.random.Generator:
        """A stream of its own, for other laws: one, that goes on from call to call."""
        if self._other is None:
            self._other = stream(self._seed, self._purpose, *self._place)
        return self._other

    def _drawn(self, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        """N(0, 1) of coordinates of one block, which is drawn from its beginning."""
        block = start // BLOCK
        drawn = self._generator(block).standard_normal(stop - block * BLOCK, dtype=dtype)
        return drawn[start - block * BLOCK :]

    def _generator(self, block: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self._key, counter=self._counter + (block << 64)))

    def _in_blocks(self, start: int, stop: int, work: Callable[[int, int], None], threads: int) -> None:
        """work(start, stop) for the part of each block that lies between, by several threads where it is worth it."""
        places = [start, *range((start // BLOCK + 1) * BLOCK, stop, BLOCK), stop] if stop > start else []
        parts = list(pairwise(places))
        if threads == 1 or len(parts) < 2 * threads:
            for part in parts:
                work(*part)
            return
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(work, *part) for part in parts]:
                done.result()
