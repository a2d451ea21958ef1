"""Noise of one release drawn where the sum is: on a GPU, by torch's own counter-based generator."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fedsim.engine.work import Vector
from fedsim.errors import InvalidInput

BLOCK = 1 << 20
"""Coordinates that one key stands for."""


class DeviceNoise:
    """Gaussian noise on a tensor, in float32, without a copy to the host.

    As `StreamNoise`, with blocks of BLOCK coordinates, each from a key of its own: BLAKE2b of (seed, purpose, place,
    block). CUDA's generator is Philox-4x32 with 64 bits of key and a place in its sequence, which take 126 bits of it.
    Two kinds of device draw differently from the same seed, and neither draws what StreamNoise does on a CPU.

    Args:
        seed: The run's noise seed, or secret key bytes.
        purpose: What the noise is for.
        place: Integers that tell apart the uses of one purpose (round, attempt).
        device: Where totals are.
    """

    def __init__(self, seed: int | bytes, purpose: str, *place: int, device: torch.device) -> None:
        secret = seed if isinstance(seed, bytes) else str(int(seed)).encode()
        self._key = hashlib.blake2b(secret, digest_size=32).digest()
        self._text = f"normal on a device/{purpose}/{place}"
        self._generator = torch.Generator(device)
        self._next = 0

    def add_normal(self, total: Vector, std: float) -> None:
        """Add N(0, std²) to every value of total, a float32 tensor on the device, in place.

        The first call is for the first coordinates of the vector, each further one for those that follow.
        """
        begin, self._next = self._next, self._next + len(total)
        for block in range(begin // BLOCK, -(-self._next // BLOCK)):
            start, stop = max(begin, block * BLOCK), min(self._next, (block + 1) * BLOCK)
            drawn = self._block(block, total)[start - block * BLOCK : stop - block * BLOCK]
            total[start - begin : stop - begin].add_(drawn, alpha=std)

    def draw_ahead(self, normals: Sequence[tuple[int, float]], dtype: type[np.generic], most: int) -> Iterator[None]:
        """Nothing: while workers compute the device is theirs, and drawing takes it no time."""
        yield from ()

    def generator(self) -> np.random.Generator:
        """There is none: other laws are drawn on the host.

        Raises:
            InvalidInput: Always.
        """
        raise InvalidInput("plan.mechanism", "noise that is not Gaussian", "Gaussian noise on a device")

    def _block(self, block: int, like: torch.Tensor) -> torch.Tensor:
        """N(0, 1) of all coordinates of a block: drawn whole, for how many are drawn decides what each is."""
        words = hashlib.blake2b(f"{self._text}/{block}".encode(), key=self._key, digest_size=16).digest()
        if like.device.type == "cuda":
            offset = int.from_bytes(words[8:], "little") >> 4 << 2  # a multiple of 4, below 2^62
            state = words[:8] + offset.to_bytes(8, "little")
            self._generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
        else:
            self._generator.manual_seed(int.from_bytes(words[:8], "little", signed=True))
        return torch.empty(BLOCK, dtype=like.dtype, device=like.device).normal_(generator=self._generator)
