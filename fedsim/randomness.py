"""Keyed counter-based random streams: one per purpose and place, so that no stream is ever used twice."""

import hashlib
import json

import numpy as np

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


def _digest(seed: int | bytes, text: str) -> bytes:
    """16 bytes that depend on seed and text alone."""
    secret = seed if isinstance(seed, bytes) else str(int(seed)).encode()
    key = hashlib.blake2b(secret, digest_size=32).digest()
    return hashlib.blake2b(text.encode(), key=key, digest_size=16).digest()


class StreamNoise:
    """Noise of one release from a keyed stream, in floating point.

    Args:
        generator: The stream; used for nothing else.
    """

    CHUNK = 1 << 20
    """Coordinates whose noise is drawn at once: bounds the extra memory to a few megabytes."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def add_normal(self, total: np.ndarray, std: float) -> None:
        """Add N(0, std²) to every value of total, float32 or float64, in place and in its own precision."""
        scale = total.dtype.type(std)
        for start in range(0, len(total), self.CHUNK):
            part = total[start : start + self.CHUNK]
            part += scale * self._generator.standard_normal(len(part), dtype=total.dtype)

    def generator(self) -> np.random.Generator:
        """The stream itself, for other laws."""
        return self._generator
