"""Gradients of weights of which each vector meets one of many, as a router decides: those of a layer of experts."""

from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
import torch

from fedsim.gradients.model import on_device
from fedsim.gradients.per_unit.outer_products import add_outer, bucket_norms, zeroed
from fedsim.gradients.per_unit.products import end_to_end
from fedsim.gradients.per_unit.unit_gradients import UnitGradients
from fedsim.gradients.rows.segments import Segments, Term


class Routing:
    """Which expert each vector of a pass goes to, and whose it is.

    Vectors are ordered by expert, those of an expert by unit, and its units by how many they have, so that each
    expert's vectors are segments of their own.

    Args:
        expert: int64 [M], of the units' vectors, end to end as in `segments`.
        experts: How many experts there are.
        segments: Of the u units' vectors; may have more vectors than belong to units.

    Attributes:
        segments: As given.
        order: int64 [M], which vector is at each place.
        owner, expert: int64 [M], whose it is, and which expert's.
        parts: Of each expert that has vectors: which it is, its places, the segments of its units, and which units
            these are, int64.
        units: u.
    """

    def __init__(self, expert: torch.Tensor, experts: int, segments: Segments) -> None:
        self.segments, self.units, device = segments, len(segments), expert.device
        key = expert * self.units + segments.owner
        counts = torch.bincount(key, minlength=experts * self.units).cpu().numpy().reshape(experts, self.units)
        by_count = np.argsort(counts, axis=1, kind="stable")
        rank = np.empty_like(by_count)
        np.put_along_axis(rank, by_count, np.arange(self.units)[None], 1)
        place = expert * self.units + on_device(rank.ravel(), device)[key]
        self.order = torch.argsort(place, stable=True)
        self.owner, self.expert = segments.owner[self.order], expert[self.order]
        self.parts: list[tuple[int, slice, Segments, torch.Tensor]] = []
        start = 0
        for which, (own, units) in enumerate(zip(counts, by_count, strict=True)):
            units = units[own[units] > 0]
            stop = start + int(own.sum())
            if len(units):
                of_expert = Segments(own[units], device), on_device(units, device)
                self.parts.append((which, slice(start, stop), *of_expert))
            start = stop

    def products(self, vectors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Each vector times its expert's matrix: [M, p] and [experts, p, q] to [M, q]."""
        found = vectors.new_empty(len(vectors), weights.shape[2])
        for which, places, _, _ in self.parts:
            torch.matmul(vectors[places], weights[which], out=found[places])
        return found


class RoutedGradients(UnitGradients):
    """The gradients of one parameter [experts, p, q]: left^T right over a unit's vectors that an expert gets.

    Args:
        shape: Of the parameter.
        routing: Says which vectors these are.
        left, right: [M, p] and [M, q], as ordered there.
        stacked: Turns a tensor of the parameter's shape into a view of it, [experts, p, q].
    """

    def __init__(
        self,
        shape: torch.Size,
        routing: Routing,
        left: torch.Tensor,
        right: torch.Tensor,
        stacked: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__(shape, routing.units)
        self.routing, self.left, self.right, self._stacked = routing, left, right, stacked

    @property
    def _factors(self) -> bool:
        return True

    def squared_norms(self, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of each expert's part, added up: the parts of a gradient are beside each other.

        Args:
            first: 0, for there is no `gram_term`.
        """
        assert not first
        squares: list[torch.Tensor] = []
        spreads: list[torch.Tensor] = []
        owners: list[torch.Tensor] = []
        for _, places, segments, units in self.routing.parts:
            left, right = self.left[places], self.right[places]
            for bucket in segments.buckets:
                squared, spread, path = bucket_norms(bucket.of(left, zeroed=True), bucket.of(right))
                squares.append(squared.double())
                spreads.append(spread.double())
                self.paths.add(path)
            owners.append(units)
        nothing = torch.zeros(self.routing.units, dtype=torch.float64, device=self.left.device)
        if not owners:
            return nothing, nothing
        owner = torch.cat(owners)
        return nothing.index_add(0, owner, end_to_end(squares)), nothing.index_add(0, owner, end_to_end(spreads))

    def add_weighted(self, target: torch.Tensor, factors: torch.Tensor, without: Sequence[Term] = ()) -> None:
        """target, of the parameter's shape, += Σ over units of factors [u] · gradient."""
        matrices = self._stacked(target)
        for which, places, segments, units in self.routing.parts:
            # Kernels write to what is contiguous alone.
            whole = matrices[which] if matrices.is_contiguous() else torch.zeros_like(matrices[which]).contiguous()
            add_outer(whole, self.left[places], self.right[places], factors[units], segments)
            if not matrices.is_contiguous():
                matrices[which] += whole

    def zero(self, units: torch.Tensor) -> None:
        """Make the gradients of units, bool [u], exactly zero."""
        gone = units[self.routing.owner]
        self.left, self.right = zeroed(self.left, gone), zeroed(self.right, gone)

    def gram_term(self) -> Term | None:
        """None: there is a term an expert."""
        return None

    def hold_from(self, first: int) -> NoReturn:
        """Nothing is added to these."""
        raise RuntimeError("a weight of experts is used by something else, too")

    add_held = add_outer = add_lookup = add_formed_again = hold_from  # type: ignore[assignment]
