"""Which vectors of a pass belong to which unit: those of a unit lie next to each other."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fedsim.gradients.model import on_device, wide_dtype

BUCKET_SPREAD = 1.25
"""How much longer than its shortest the longest unit of a bucket may be; what is filled up is computed for nothing."""
BUCKET_LENGTH = 128
"""On a CPU units of more vectors are in a bucket only with units of as many: each is work enough for itself."""
WIDE = 2**12
"""Features of a vector from which on a CPU copies none to fill units up: they are taken by themselves instead."""
BAG_LENGTH = 64
"""Vectors that are added up one after the other; a GPU would do one long unit so, and stand still otherwise."""


class Segments:
    """Where each unit's vectors lie in a tensor [M, d]: one contiguous range a unit, end to end from the first on.

    Vectors after the last range belong to nobody. Units are sorted by their number of vectors, so that those of like
    numbers are neighbours.

    Args:
        lengths: Vectors of each unit, int64 [u], none below the one before.
        device: Where the vectors are.

    Attributes:
        lengths: As given.
        offsets: int64 [u + 1], from 0.
    """

    def __init__(self, lengths: np.ndarray, device: torch.device) -> None:
        assert (np.diff(lengths) >= 0).all()
        self.lengths = lengths
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.device = device
        self._multiples: dict[int, Segments] = {}
        self._cuts: dict[tuple[int, int], Segments] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Vectors that belong to a unit."""
        return int(self.offsets[-1])

    @cached_property
    def uniform(self) -> bool:
        """Whether all units have as many vectors."""
        return bool(self.lengths[0] == self.lengths[-1])

    def times(self, number: int) -> "Segments":
        """The same units where each of these vectors stands for so many."""
        if number == 1:
            return self
        if number not in self._multiples:
            self._multiples[number] = Segments(self.lengths * number, self.device)
        return self._multiples[number]

    def cut(self, first: int, stop: int, *tensors: torch.Tensor) -> "Term":
        """Some neighbouring units by themselves, and their part of tensors [M, …]."""
        vectors = slice(int(self.offsets[first]), int(self.offsets[stop]))
        segments = self
        if (first, stop) != (0, len(self)):
            if (first, stop) not in self._cuts:
                self._cuts[first, stop] = Segments(self.lengths[first:stop], self.device)
            segments = self._cuts[first, stop]
        return segments, tuple(tensor[vectors] for tensor in tensors)

    def pieces(self, most: int) -> list[slice]:
        """All vectors in pieces of neighbours, none of which has more than `most` of one unit."""
        found, start = [], 0
        for begin, end in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True):
            while end - max(begin, start) > most:
                stop = max(begin, start) + most
                found.append(slice(start, stop))
                start = stop
        return [*found, slice(start, self.total)]

    @cached_property
    def owner(self) -> torch.Tensor:
        """The unit of each vector that has one, int64 [total]."""
        return on_device(np.repeat(np.arange(len(self)), self.lengths), self.device)

    def each(self, values: torch.Tensor) -> torch.Tensor:
        """Every vector's unit's value: those of units, [u] or for more units, to [total]."""
        if self.uniform:
            return values[: len(self), None].expand(-1, int(self.lengths[0])).reshape(-1)
        return values[self.owner]

    @cached_property
    def starts(self) -> torch.Tensor:
        """`offsets` on the device, int64 [u + 1]."""
        return on_device(self.offsets, self.device)

    @cached_property
    def buckets(self) -> "list[Bucket]":
        """All units, in pieces of like numbers of vectors."""
        return self._pieces(self._alike)

    def buckets_of(self, features: int) -> "list[Bucket]":
        """`buckets` for vectors of so many features: on a CPU pieces of equal numbers where a copy is dear."""
        return self._equal if features >= WIDE and self.device.type == "cpu" else self.buckets

    @cached_property
    def _equal(self) -> "list[Bucket]":
        return self._pieces(lambda first, other: bool(self.lengths[first] == self.lengths[other]))

    def _pieces(self, together: Callable[[int, int], bool]) -> "list[Bucket]":
        """Neighbouring units as long as each may be together with the first of them."""
        first, found = 0, []
        for stop in range(1, len(self) + 1):
            if stop == len(self) or not together(first, stop):
                found.append(self.bucket(first, stop))
                first = stop
        return found

    def sums(self, vectors: torch.Tensor) -> torch.Tensor:
        """The sum of each unit's vectors, [M, d] → [u, d], float32 or wider."""
        wide = wide_dtype(vectors.dtype)
        if self.uniform:
            return vectors[: self.total].view(len(self), -1, vectors.shape[1]).sum(1, dtype=wide)
        # A bag of all vectors from each start on is that sum, in one kernel, the same from call to call.
        pieces, of_pieces = self._bags
        summed = _bagged(vectors[: self.total].to(wide), *pieces)
        return summed if of_pieces is None else _bagged(summed, *of_pieces)

    def filled(self, vectors: torch.Tensor, zeroed: bool = False) -> list[torch.Tensor]:
        """`Bucket.of` of every bucket: what has to be copied of all of them is, at once."""
        copied = [bucket for bucket in self.buckets if isinstance(bucket.where, torch.Tensor)]
        if len(copied) < 2:
            return [bucket.of(vectors, zeroed) for bucket in self.buckets]
        where, beyond = self._copied
        taken = vectors.index_select(0, where)
        if zeroed:
            taken.masked_fill_(beyond.view(-1, *[1] * (vectors.ndim - 1)), 0)
        parts = iter(torch.split(taken, [bucket.copied for bucket in copied]))
        return [
            next(parts).view(-1, bucket.length, *vectors.shape[1:]) if bucket.copied else bucket.of(vectors)
            for bucket in self.buckets
        ]

    @property
    def copied(self) -> int:
        """How many vectors `filled` copies."""
        return sum(bucket.copied for bucket in self.buckets)

    @cached_property
    def _copied(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The buckets that are copied, end to end: which vector each is, and whether it fills a unit up."""
        found = [(bucket.where, bucket.beyond) for bucket in self.buckets]
        where, beyond = zip(
            *((w, b.ravel()) for w, b in found if isinstance(w, torch.Tensor) and b is not None), strict=True
        )
        return torch.cat(where), torch.cat(beyond)

    @cached_property
    def _bags(self) -> "tuple[Bags, Bags | None]":
        """Pieces of units, of BAG_LENGTH vectors at most, and units of pieces."""
        places = torch.arange(self.total, device=self.device)
        if not len(self) or self.lengths[-1] <= BAG_LENGTH:
            return (places, self.starts[:-1]), None
        numbers = -(-self.lengths // BAG_LENGTH)
        first = np.cumsum(numbers) - numbers
        place = np.arange(numbers.sum()) - np.repeat(first, numbers)
        starts = np.repeat(self.offsets[:-1], numbers) + BAG_LENGTH * place
        of_pieces = places[: len(starts)], on_device(first, self.device)
        return (places, on_device(starts, self.device)), of_pieces

    def _alike(self, first: int, other: int) -> bool:
        """Whether two units may share a bucket."""
        shorter, longer = self.lengths[first], self.lengths[other]
        small = longer <= BUCKET_LENGTH or self.device.type != "cpu"
        return bool(shorter == longer or (small and longer <= BUCKET_SPREAD * shorter))

    def bucket(self, first: int, stop: int) -> "Bucket":
        """Some neighbouring units as one tensor."""
        lengths, start = self.lengths[first:stop], int(self.offsets[first])
        longest = int(lengths[-1])
        if lengths[0] == longest:
            return Bucket(slice(first, stop), longest, slice(start, int(self.offsets[stop])), None)
        place = np.arange(longest)
        # A unit is filled up with its own last vector, made zero: with one of another's an infinity would reach it.
        index = self.offsets[first:stop, None] + np.minimum(place, lengths[:, None] - 1)
        beyond = place >= lengths[:, None]
        return Bucket(
            slice(first, stop),
            longest,
            on_device(index.ravel(), self.device),
            on_device(beyond, self.device),
        )


@dataclass(frozen=True)
class Bucket:
    """Units of like numbers of vectors, as one tensor.

    Attributes:
        units: Which they are.
        length: Vectors of the longest.
        where: Their vectors' places, end to end where all have as many, so that nothing needs to be copied.
        beyond: bool [units, length], what a unit was filled up with; None where nothing was.
    """

    units: slice
    length: int
    where: slice | torch.Tensor
    beyond: torch.Tensor | None

    @property
    def copied(self) -> int:
        """How many vectors `of` copies."""
        return 0 if isinstance(self.where, slice) else len(self.where)

    def of(self, vectors: torch.Tensor, zeroed: bool = False) -> torch.Tensor:
        """[M, …] → [units, length, …]; what units were filled up with is zero if asked for, else their last vector."""
        taken = vectors[self.where] if isinstance(self.where, slice) else vectors.index_select(0, self.where)
        found = taken.view(-1, self.length, *vectors.shape[1:])
        if zeroed and self.beyond is not None:
            found.masked_fill_(self.beyond.view(*self.beyond.shape, *[1] * (vectors.ndim - 1)), 0)
        return found


Bags = tuple[torch.Tensor, torch.Tensor]
"""Places 0, 1, … of vectors, int64 [M], and where each bag of them begins."""
Term = tuple[Segments, tuple[torch.Tensor, ...]]
"""Tensors [M, …] whose vectors are those of units, end to end."""


def joined(terms: list[Term]) -> Term:
    """Several terms of the same units, each of some tensors [M, d], as one, unit after unit."""
    if len(terms) == 1:
        return terms[0]
    whole = Segments(np.sum([segments.lengths for segments, _ in terms], 0), terms[0][0].device)
    owner = np.concatenate([np.repeat(np.arange(len(segments)), segments.lengths) for segments, _ in terms])
    order = on_device(np.argsort(owner, kind="stable"), whole.device)
    tensors = zip(*(tuple(x[: segments.total] for x in tensors) for segments, tensors in terms), strict=True)
    return whole, tuple(torch.cat(parts).index_select(0, order) for parts in tensors)


def _bagged(vectors: torch.Tensor, places: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The sum of vectors [M, d] from each start to the next."""
    summed: torch.Tensor = torch.nn.functional.embedding_bag(places, vectors, starts, mode="sum")
    return summed
