"""Blocks of parameters that share a noise scale: layer × matrix, LoRA factors apart."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedsim.errors import InvalidInput

_VECTOR = re.compile(r"\.(weight|bias)$")


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Which block each parameter belongs to, and where its values lie in the flat vector.

    Attributes:
        names: Parameter names, in the order of the flat vector.
        sizes: Values of each parameter.
        labels: Names of the blocks.
        block_of: Index into labels for each parameter.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    labels: tuple[str, ...]
    block_of: tuple[int, ...]

    @classmethod
    def by_matrix(cls, sizes: Mapping[str, int]) -> "Blocks":
        """One block for each matrix of each layer with its bias; LoRA's A and B factors are matrices of their own.

        Args:
            sizes: Values of each parameter by name, in the order of the flat vector.
        """
        return cls._grouped(sizes, [_VECTOR.sub("", name) for name in sizes])

    @classmethod
    def by_layer(cls, sizes: Mapping[str, int]) -> "Blocks":
        """One block for each numbered layer; what is outside of layers by matrix."""
        labels = []
        for name in sizes:
            numbered = re.match(r".*?\.\d+(?=\.)", name)
            labels.append(numbered.group() if numbered else _VECTOR.sub("", name))
        return cls._grouped(sizes, labels)

    @classmethod
    def _grouped(cls, sizes: Mapping[str, int], labels: Sequence[str]) -> "Blocks":
        distinct = tuple(dict.fromkeys(labels))
        return cls(
            names=tuple(sizes),
            sizes=tuple(sizes.values()),
            labels=distinct,
            block_of=tuple(distinct.index(label) for label in labels),
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def block_sizes(self) -> np.ndarray:
        """Values in each block, float64 [blocks]."""
        return np.bincount(self.block_of, weights=self.sizes, minlength=len(self))

    def means(self, flat: np.ndarray) -> np.ndarray:
        """Mean of a flat vector [P] over each block, float64 [blocks].

        Raises:
            InvalidInput: For a vector of another size.
        """
        if flat.shape != (sum(self.sizes),):
            raise InvalidInput("flat", flat.shape, f"a vector of {sum(self.sizes)} values")
        starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)
        sums = np.add.reduceat(flat, starts, dtype=np.float64)
        means: np.ndarray = np.bincount(self.block_of, weights=sums, minlength=len(self)) / self.block_sizes
        return means

    def by_parameter(self, scales: np.ndarray) -> dict[str, float]:
        """Each parameter's scale, from one for each block."""
        return {name: float(scales[block]) for name, block in zip(self.names, self.block_of, strict=True)}
