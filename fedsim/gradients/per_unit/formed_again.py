"""A head's per-unit gradients whose large factor, the logits' gradient, is formed twice instead of kept."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fedsim.errors import Failure
from fedsim.gradients.per_unit.logits import HeadInputs, Logits
from fedsim.gradients.per_unit.outer_products import add_outer, at_words, bucket_norms, inner_with_rows, zeroed
from fedsim.gradients.rows.segments import Segments, Term


class FormedAgain:
    """Gradients left^T right of a head's weight [V, d]; left is the logits' gradient [M, V] at the units' positions.

    Of a vocabulary of 262,144 words left takes a gibibyte for 1,024 positions in float32. It exists for a few whole
    units at a time: in the head's forward pass, which forms it anyway, `measure` takes of it what norms need, and
    `add_weighted` forms it once more, for one more product of the head.

    The norms bound the sum because both are of the same gradient, the same bit by bit: it is formed by the same
    operations on the same tensors, the same positions together, and none of these operations depends on chance.
    Products of one shape are the same from call to call in cuBLAS, on one stream, and on a CPU with as many threads.

    Args:
        segments: The units, whose vectors are the first M positions of the head.
        inputs: What the logits are computed from; nothing may write to it as long as this is used.
        right: [M, d], hidden states times coefficients.
        words: int64 [M], what the model is given at the positions: where an embedding that shares the weight looks up.
        positions: As many are formed together; a unit that has more, with no other.

    Attributes:
        segments: As given.
        groups: Units that are formed together, one after the other.
        squares: Squared norms of the units' gradients, float64 [u].
        spreads: How far rounding errors of these reach, as of `gram_inner`, float64 [u].
        paths: How they were found.
    """

    def __init__(
        self, segments: Segments, inputs: HeadInputs, right: torch.Tensor, words: torch.Tensor, positions: int
    ) -> None:
        self.segments, self._inputs, self._versions = segments, inputs, inputs.versions
        self._right, self._words = right, words
        self.groups = list(_groups(segments, positions))
        self.squares = torch.zeros(len(segments), dtype=torch.float64, device=right.device)
        self.spreads = torch.zeros_like(self.squares)
        self.paths = {"formed again"}
        self._at_words: list[torch.Tensor] = []
        self._left_out: torch.Tensor | None = None

    def places(self, units: slice) -> slice:
        """The positions of a group."""
        return slice(*self.segments.offsets[[units.start, units.stop]].tolist())

    @property
    def largest(self) -> int:
        """Positions of the largest group."""
        offsets = self.segments.offsets
        return int(max(offsets[units.stop] - offsets[units.start] for units in self.groups))

    def measure(self, units: slice, left: torch.Tensor) -> None:
        """Note what norms need of the logits' gradient of a group, [n, V]; each group once, in order."""
        segments, (right, words) = self.segments.cut(units.start, units.stop, self._right, self._words)
        squares, spreads = self.squares[units], self.spreads[units]
        for bucket in segments.buckets_of(left.shape[1]):
            own = bucket.of(left, zeroed=True)
            squares[bucket.units], spreads[bucket.units], path = bucket_norms(own, bucket.of(right))
            self.paths.add(path)
            self._at_words.append(at_words(own, bucket.of(words)))

    def meets(self, lookups: Sequence[Term]) -> bool:
        """Whether `inner_with_rows` may be asked for rows that were looked up: at the words noted here, or none."""
        if len(lookups) != 1:
            return not lookups
        segments, (index, _) = lookups[0]
        return np.array_equal(segments.lengths, self.segments.lengths) and torch.equal(index, self._words)

    def inner_with_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The inner product of each unit's gradient and rows [M, d] that are added at the words: [u]."""
        found: list[torch.Tensor] = []
        for units in self.groups:
            segments, (right, own) = self.segments.cut(units.start, units.stop, self._right, rows)
            for bucket in segments.buckets_of(self._inputs.weight.shape[0]):
                places = self._at_words[len(found)]
                found.append(inner_with_rows(places, bucket.of(right), bucket.of(own, zeroed=True)))
        return torch.cat(found)

    def add_weighted(self, target: torch.Tensor, factors: torch.Tensor) -> None:
        """target [V, d] += Σ over units of factors [u] · gradient.

        Raises:
            Failure: What the gradient is formed of was written to since its norm was taken.
        """
        for units, left in self._formed():
            segments, (right,) = self.segments.cut(units.start, units.stop, self._right)
            add_outer(target, left, right, factors[units], segments)

    def kept(self) -> Term:
        """The same as factors that are kept.

        Raises:
            Failure: As of `add_weighted`.
        """
        return self.segments, (torch.cat([left.clone() for _, left in self._formed()]), self._right)

    def zero(self, units: torch.Tensor) -> None:
        """Make the gradients of units, bool [u], exactly zero, whatever their logits are."""
        self._left_out = units if self._left_out is None else self._left_out | units
        self._right = zeroed(self._right, units[self.segments.owner])

    @torch.no_grad()
    def _formed(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Each group and its logits' gradient [n, V], gone when the next one is formed."""
        if self._inputs.versions != self._versions:
            raise Failure(
                "The weights or the inputs of the model's last layer were written to while gradients were clipped, so "
                "norms are not those of what would be added up. Change the model before or after."
            )
        logits = Logits(self._inputs)
        room = self._right.new_empty(self.largest, logits.columns)
        for units in self.groups:
            places = self.places(units)
            left = logits.gradient(places, room[: places.stop - places.start])[:, : logits.width]
            if self._left_out is not None:
                owner = self.segments.cut(units.start, units.stop)[0].owner
                left.masked_fill_(self._left_out[units][owner][:, None], 0)
            yield units, left


def _groups(segments: Segments, positions: int) -> Iterator[slice]:
    """Neighbouring units that have no more than so many positions together, or one unit."""
    start = 0
    for stop in range(1, len(segments) + 1):
        if stop == len(segments) or segments.offsets[stop + 1] - segments.offsets[start] > positions:
            yield slice(start, stop)
            start = stop
