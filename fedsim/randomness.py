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
