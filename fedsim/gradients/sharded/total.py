"""A sum of which each process of a group holds a part: formed block by block, and scattered as it is formed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.distributed as dist

from fedsim.gradients.model import ParameterLayout

Fill = Callable[[str, torch.Tensor], None]
"""Adds what a process has of a parameter's sum to a tensor of its shape."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Neighbouring parameters of one block: a range of the flat vector.

    Attributes:
        names: Theirs.
        shapes: Theirs.
        start, stop: The range.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    start: int
    stop: int

    @classmethod
    def of(cls, layout: ParameterLayout, owners: list[int]) -> list[Self]:
        """The flat vector in ranges, each of parameters that have one owner.

        Args:
            layout: The parameters.
            owners: The number of the module that each belongs to.
        """
        found, first = [], 0
        for place in range(1, len(owners) + 1):
            if place == len(owners) or owners[place] != owners[first]:
                names, shapes = layout.names[first:place], layout.shapes[first:place]
                start, stop = layout.offsets[first], layout.offsets[place]
                found.append(cls(names=names, shapes=shapes, start=start, stop=stop))
                first = place
        return found

    def part(self, ranks: int) -> int:
        """Values that each of so many processes holds of it; the last ones' may reach beyond its end."""
        return -(-(self.stop - self.start) // ranks)

    def views(self, whole: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Names, and views of a tensor that begins with the bucket's values."""
        found, start = [], 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            stop = start + int(np.prod(shape, dtype=np.int64))
            found.append((name, whole[start:stop].view(shape)))
            start = stop
        return found


class ShardedTotal:
    """This process's part of a sum over the units of all.

    Of P values it holds P / ranks, and while a bucket is added that bucket besides: no process has ever the whole sum,
    nor what it adds to it.

    Args:
        buckets: Of the flat vector.
        dtype: float32, float64, or int64 for sums on a grid.
        device: Where this process computes.

    Attributes:
        parts: Of each bucket the values that this process holds.
    """

    def __init__(self, buckets: list[Bucket], dtype: torch.dtype, device: torch.device) -> None:
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._buckets = buckets
        self.parts = [torch.zeros(bucket.part(self._ranks), dtype=dtype, device=device) for bucket in buckets]

    def add(self, fill: Fill | None) -> None:
        """Add what the processes of the group have, bucket after bucket; all of them must call this.

        Args:
            fill: Adds what this process has; None where it has nothing.
        """
        for bucket, part in zip(self._buckets, self.parts, strict=True):
            whole = part.new_zeros(len(part) * self._ranks)
            if fill is not None:
                for name, view in bucket.views(whole):
                    fill(name, view)
            received = torch.empty_like(part)
            _reduce_scatter(received, whole)
            part += received

    def write_to(self, flat: torch.Tensor) -> None:
        """Write this process's part to its places in flat [P], which may be memory that the group shares."""
        for bucket, part in zip(self._buckets, self.parts, strict=True):
            start = bucket.start + self._rank * len(part)
            stop = max(start, min(start + len(part), bucket.stop))
            flat[start:stop].copy_(part[: stop - start])


def _reduce_scatter(received: torch.Tensor, whole: torch.Tensor) -> None:
    """torch's, by either of its names."""
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce(received, whole)
