"""Keyed counter-based random streams: one per purpose and place, so that no stream is ever used twice."""

import hashlib
import json

import numpy as np


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
    secret = seed if isinstance(seed, bytes) else str(int(seed)).encode()
    text = json.dumps([purpose, *map(int, place)]).encode()
    digest = hashlib.blake2b(text, key=hashlib.blake2b(secret, digest_size=32).digest(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


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
