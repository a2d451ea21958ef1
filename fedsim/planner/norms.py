"""L(G): how long a user's mean gradient is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.validation import require_positive


@dataclass(frozen=True, kw_only=True)
class NormCurve:
    """L(G)/L(1): the typical norm of a user's mean gradient over G examples, relative to one example's.

    Attributes:
        name: "aligned", "orthogonal", "measured" or "assumed".
        group_sizes: Ascending from 1.
        norms: L(G)/L(1) at them; between them interpolated in logarithms, beyond them held, which favours neither.
    """

    name: str
    group_sizes: tuple[int, ...]
    norms: tuple[float, ...]

    @classmethod
    def of_alignment(cls, name: str, alignment: float, largest: int = 1 << 20) -> "NormCurve":
        """L(G)² ∝ alignment + (1 − alignment)/G: a part that a user's examples share, and one that averages out.

        Args:
            name: Its name.
            alignment: Mean cosine between gradients of one user's examples: 1 alike, 0 orthogonal.
            largest: Largest group size covered.
        """
        if not 0 <= alignment <= 1:
            raise InvalidInput("alignment", alignment, "a number from 0 (orthogonal) to 1 (aligned)")
        sizes = tuple(sorted({round(2 ** (i / 8)) for i in range(8 * largest.bit_length())}))
        return cls(
            name=name,
            group_sizes=sizes,
            norms=tuple(math.sqrt(alignment + (1 - alignment) / size) for size in sizes),
        )

    @classmethod
    def measured(cls, group_sizes: Sequence[int], norms: Sequence[float]) -> "NormCurve":
        """From typical norms measured at some group sizes, the first of which is 1."""
        if not group_sizes or group_sizes[0] != 1 or len(group_sizes) != len(norms):
            raise InvalidInput("group_sizes", tuple(group_sizes), "ascending from 1, with one norm each")
        for value in norms:
            require_positive("norms", value)
        return cls(name="measured", group_sizes=tuple(group_sizes), norms=tuple(n / norms[0] for n in norms))

    def __call__(self, group_size: float) -> float:
        """L(G)/L(1)."""
        logs = np.interp(math.log(group_size), np.log(self.group_sizes), np.log(self.norms))
        return float(np.exp(logs))


ALIGNED = NormCurve(name="aligned", group_sizes=(1,), norms=(1.0,))
ORTHOGONAL = NormCurve.of_alignment("orthogonal", 0.0)
