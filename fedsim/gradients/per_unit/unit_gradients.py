"""Gradients of units, kept as factors where those are smaller than the gradients themselves."""

from collections.abc import Sequence

import numpy as np
import torch

from fedsim.gradients.kernels import usable
from fedsim.gradients.model import wide_dtype
from fedsim.gradients.per_unit.formed_again import FormedAgain
from fedsim.gradients.per_unit.outer_products import (
    add_outer,
    bucket_norms,
    cross,
    least_held,
    longest_gram,
    outer_products,
    zeroed,
)
from fedsim.gradients.per_unit.products import end_to_end, squared_row_norms
from fedsim.gradients.rows.segments import Segments, Term, joined


class UnitGradients:
    """The gradients of one parameter for the u units of a pass, as a sum of four kinds of terms.

    held: gradients themselves, of the units from `first` on: [u - first, *shape].
    outers: pairs (left [M, p], right [M, q]) of the units before, a gradient [p, q] = left^T right over a unit's
        vectors: what a matrix product leaves.
    lookups: pairs (index [M], rows [M, q]) of the units before: rows are added at the places that index names along
        the first axis.
    again: one term like those of outers whose left is not kept, as it would be too large (`FormedAgain`). It becomes
        one of outers where others are added to the same parameter.

    Held gradients are used for units for which they take no more memory than the factors: for p·q values of a gradient
    against n·(p + q) of its factors. The same comparison tells which is less arithmetic: the norm of a held gradient
    takes n·p·q products (which the sum needs anyway), the Gram form n²·(p + q) and the sum n·p·q besides. Units are
    sorted by n, so these are the last ones.
    """

    def __init__(self, shape: torch.Size, units: int) -> None:
        self.shape = shape
        self.first = units
        self.held: torch.Tensor | None = None
        self.outers: list[Term] = []
        self.lookups: list[Term] = []
        self.again: FormedAgain | None = None
        self.paths: set[str] = set()

    def add_held(self, gradients: torch.Tensor, path: str = "held") -> None:
        """Add gradients of the last units, [some, *shape]; all of them are held from now on."""
        self.paths.add(path)
        gradients = gradients.to(wide_dtype(gradients.dtype))
        whole = self.first + (0 if self.held is None else len(self.held))
        self.hold_from(whole - len(gradients))
        if self.held is None:
            self.held, self.first = gradients, whole - len(gradients)
        else:
            self.held[-len(gradients) :] += gradients

    def add_outer(self, left: torch.Tensor, right: torch.Tensor, segments: Segments) -> None:
        """Add left^T right over each unit's vectors, left [M, p], right [M, q]; unlike dtypes widened."""
        if left.dtype != right.dtype:  # else the norm would be of a rounding of what is added
            wide = torch.promote_types(left.dtype, right.dtype)
            left, right = left.to(wide), right.to(wide)
        least = least_held(left.shape[1], right.shape[1], left.element_size())
        first = min(self.first, int(np.searchsorted(segments.lengths, least)))
        if first < len(segments):
            self.add_held(outer_products(*segments.cut(first, len(segments), left, right)))
        if first:
            self.outers.append(segments.cut(0, first, left, right))

    def add_lookup(self, index: torch.Tensor, rows: torch.Tensor, segments: Segments) -> None:
        """Add rows [M, q] at index [M] along the first axis."""
        first = min(self.first, int(np.searchsorted(segments.lengths, self.shape[0])))
        if first < len(segments):
            part, (places, added) = segments.cut(first, len(segments), index, rows)
            if self.held is not None and first == self.first:
                self._add_to(self.held, part, places, added)  # a table of its own would be as large again
            else:
                self.add_held(self._table(part, places, added))
        if first:
            self.lookups.append(segments.cut(0, first, index, rows))

    def add_formed_again(self, term: FormedAgain) -> None:
        """Add a head's gradients of the units before those that are held, before any other term of these is added."""
        assert self.first == len(term.segments)
        assert self.again is None
        self.again = term

    def held_elements(self) -> int:
        """Values of the gradients held."""
        return 0 if self.held is None else self.held.numel()

    def take_held(self) -> torch.Tensor:
        """The gradients held, of the units from `first` on, which are the caller's from now on."""
        assert self.held is not None
        held, self.held = self.held, None
        return held

    @property
    def units(self) -> slice:
        """The units of which there is anything here: all, but for those whose gradients were taken."""
        start = 0 if self._factors else self.first
        return slice(start, self.first + (0 if self.held is None else len(self.held)))

    @property
    def any(self) -> bool:
        """Whether there are gradients here that nobody took."""
        return self.held is not None or self._factors

    @property
    def _factors(self) -> bool:
        return bool(self.outers or self.lookups) or self.again is not None

    def gram_term(self) -> Term | None:
        """The factors of the first units, whose norms a kernel is to find in Gram form; None where another way is
        right for all."""
        if self.lookups or self.again is not None or not self.outers:
            return None
        if not all(usable(*factors) for _, factors in self.outers):
            return None
        self.outers = [joined(self.outers)]
        segments, (left, right) = self.outers[0]
        stop = int(np.searchsorted(segments.lengths, longest_gram(left.shape[1], right.shape[1]), side="right"))
        if not stop:
            return None
        self.paths.add("Gram norm")
        return segments.cut(0, stop, left, right)

    def squared_norms(self, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared norms of `units`, and their spreads: how far rounding errors reach (`gram_inner`, `unsure`).

        The spread is 0 where the norm was taken of the gradient itself. Of an outer part and rows added to it, errors
        reach as far as both are long, however short they leave their sum: an error of the cross term is
        eps · |L[t, x_s]||r_t||e_s|, and these add up to no more than eps · (spread of the outer part · ‖rows‖²)^½.

        Args:
            first: Units before are left out: those of `gram_term`.
        """
        squares, spreads = [], []
        if self._factors and first < self.first:
            squared, spread = self._factor_norms(first)
            squares.append(squared)
            spreads.append(spread)
        if self.held is not None:
            squares.append(squared_row_norms(self.held.flatten(1)))
            spreads.append(torch.zeros_like(squares[-1]))
        return end_to_end(squares), end_to_end(spreads)

    def add_weighted(self, target: torch.Tensor, factors: torch.Tensor, without: Sequence[Term] = ()) -> None:
        """target [*shape] += Σ over units of factors [u] · gradient.

        Args:
            without: Those of `outers` that the caller adds.
        """
        if self.held is not None:
            target.view(-1).addmv_(self.held.flatten(1).t(), factors[self.first :].to(self.held.dtype))
        for term in self.outers:
            if not any(term is other for other in without):
                segments, (left, right) = term
                add_outer(target, left, right, factors[: self.first], segments)
        if self.again is not None:
            self.again.add_weighted(target, factors[: self.first])
        for segments, (index, rows) in self.lookups:
            target.index_add_(0, index, (rows * segments.each(factors)[:, None]).to(target.dtype))

    def zero(self, units: torch.Tensor) -> None:
        """Make the gradients of units, bool [u], exactly zero: a factor of 0 would leave 0 · inf = nan."""
        if self.held is not None:
            self.held[units[self.first :]] = 0
        self.outers = [(s, tuple(zeroed(x, units[s.owner]) for x in factors)) for s, factors in self.outers]
        self.lookups = [(s, (index, zeroed(rows, units[s.owner]))) for s, (index, rows) in self.lookups]
        if self.again is not None:
            self.again.zero(units[: self.first])

    def hold_from(self, first: int) -> None:
        """Hold the gradients of the units from `first` on, whatever they have been kept as so far."""
        if first >= self.first or not self.any:
            return
        self._keep_again()
        held = [] if self.held is None else [self.held]
        more: list[torch.Tensor] = []
        for segments, factors in self.outers:
            more.append(outer_products(*segments.cut(first, self.first, *factors)))
        for segments, (index, rows) in self.lookups:
            part, (index, rows) = segments.cut(first, self.first, index, rows)
            more.append(self._table(part, index, rows))
        if not more:
            assert self.held is not None
            more.append(self.held.new_zeros(self.first - first, *self.shape))
        self.held = torch.cat([sum(more[1:], start=more[0]), *held])
        kept = [[s.cut(0, first, *factors) for s, factors in terms if first] for terms in (self.outers, self.lookups)]
        self.first, (self.outers, self.lookups) = first, kept

    def _table(self, segments: Segments, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What is looked up as gradients, [u, *shape]."""
        table = rows.new_zeros(len(segments), *self.shape, dtype=wide_dtype(rows.dtype))
        self._add_to(table, segments, index, rows)
        return table

    def _add_to(self, table: torch.Tensor, segments: Segments, index: torch.Tensor, rows: torch.Tensor) -> None:
        """table [u, *shape] += what is looked up."""
        place = index + segments.owner * self.shape[0]
        table.view(-1, self.shape[1]).index_add_(0, place, rows.to(table.dtype))

    def _keep_again(self) -> None:
        """Make the term that is formed again one of `outers`."""
        if self.again is not None:
            self.outers, self.again = [*self.outers, self.again.kept()], None

    def _factor_norms(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.again is not None and (self.outers or not self.again.meets(self.lookups)):
            self._keep_again()
        outer = joined(self.outers) if self.outers else None
        if self.again is not None:
            squared, spread = self.again.squares, self.again.spreads
            self.paths |= self.again.paths
        elif outer is not None:
            segments, factors = outer
            after = segments.cut(first, len(segments), *factors)
            squared, spread = (found.double() for found in self._outer_norms(*after))
        if not self.lookups:
            return squared, spread
        self.paths.add("gathered")
        segments, (index, rows) = joined(self.lookups)
        rows = _merged(index, rows, segments.owner)
        self.lookups = [(segments, (index, rows))]
        gathered = segments.sums(squared_row_norms(rows)[:, None])[:, 0]
        if self.again is not None:
            inner = self.again.inner_with_rows(rows)
        elif outer is not None:
            inner = cross(outer, self.lookups[0])
        else:
            return gathered, torch.zeros_like(gathered)
        self.paths.add("exact cross term")
        return squared + gathered + 2 * inner, (spread.sqrt() + gathered.sqrt()).square()

    def _outer_norms(self, segments: Segments, factors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        buckets = segments.buckets_of(max(factor.shape[1] for factor in factors))
        found = [bucket_norms(bucket.of(factors[0], zeroed=True), bucket.of(factors[1])) for bucket in buckets]
        self.paths |= {path for _, _, path in found}
        return end_to_end([squared for squared, _, _ in found]), end_to_end([spread for _, spread, _ in found])


def _merged(index: torch.Tensor, rows: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """rows [M, q], those of a unit that meet at one place of index [M] added into the first; 0 in the others.

    Added up once, so that the norm is of exactly what the sum adds: 4,096 equal rows added to a table one after the
    other are off by 6 · 10⁻⁵, and by another amount when they are scaled first.
    """
    # Sorted rather than made unique, whose number of places a GPU would have to be waited for.
    ordered, positions = torch.sort(index + owner * (index.max() + 1), stable=True)
    changes = torch.diff(ordered, prepend=ordered[:1]) != 0
    run = changes.cumsum(0)
    first = torch.full_like(positions, len(positions)).scatter_reduce_(0, run, positions, "amin")
    where = torch.empty_like(positions).scatter_(0, positions, first[run])
    wide = rows.to(wide_dtype(rows.dtype))
    return torch.zeros_like(wide).index_add_(0, where, wide)
