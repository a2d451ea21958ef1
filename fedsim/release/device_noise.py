"""Noise that the host draws, added where the sum is."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fedsim.engine.work import Vector
from fedsim.privacy.mechanisms import DrawsAhead

PIECE = 1 << 26
"""Coordinates that are brought to the device at a time."""


class DeviceNoise:
    """A source's Gaussian noise, for a tensor on another device: the same bits on any kind of device.

    A GPU's own generator would save the way there. torch's float32 one cuts a normal variable off at 6.8 deviations,
    which no δ of ours covers at 10⁸ coordinates, and draws otherwise on another model of GPU, where a round that runs
    again must have the same noise. Workers leave the host's cores free, and noise is drawn ahead.

    Args:
        source: Draws, on the host.
    """

    def __init__(self, source: DrawsAhead) -> None:
        self._source = source

    def add_normal(self, total: Vector, std: float) -> None:
        """Add N(0, std²) to every value of total, a float32 tensor, in place."""
        assert isinstance(total, torch.Tensor)
        for start in range(0, len(total), PIECE):
            piece = total[start : start + PIECE]
            drawn = np.zeros(len(piece), dtype=np.float32)
            self._source.add_normal(drawn, std)
            piece += torch.from_numpy(drawn).to(total.device)

    def draw_ahead(self, normals: Sequence[tuple[int, float]], dtype: type[np.generic], most: int) -> Iterator[None]:
        """As the source's."""
        return self._source.draw_ahead(normals, dtype, most)

    def generator(self) -> np.random.Generator:
        """The source's."""
        return self._source.generator()
