"""Per-unit gradients of one parameter, kept as factors where those are smaller than the gradients themselves."""

import torch

from fedsim.gradients.products import GRAM_ELEMENTS, add_outer, batched_inner, batched_outer, gram_inner


class UnitGradients:
    """The gradients of one parameter for the u units of a group, as a sum of three kinds of terms.

    held: [u, *shape], the gradients themselves.
    outers: pairs (left [u, n, p], right [u, n, q]), a gradient [p, q] = left^T right: what a matrix product leaves.
    lookups: pairs (index [u, m], rows [u, m, q]): rows are added at the places that index names along the first axis.

    Held gradients are used where they take no more memory than the factors: for p·q values of a gradient against
    n·(p + q) of its factors. The same comparison tells which is less arithmetic: the norm of a held gradient takes
    n·p·q products (which the sum needs anyway), the Gram form n²·(p + q) and the sum n·p·q besides.
    """

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.held: torch.Tensor | None = None
        self.outers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.lookups: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.paths: set[str] = set()

    def add_held(self, gradients: torch.Tensor, path: str = "held") -> None:
        """Add gradients [u, *shape]."""
        self.paths.add(path)
        self.held = gradients if self.held is None else self.held + gradients

    def add_outer(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add left^T right, left [u, n, p] and right [u, n, q]."""
        if holds(left, right):
            self.add_held(batched_outer(left, right))
        else:
            self.outers.append((left, right))

    def add_lookup(self, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Add rows [u, m, q] at index [u, m] along the first axis."""
        if self.held is None and self.shape[0] <= index.shape[1]:
            self.held = rows.new_zeros(len(rows), *self.shape, dtype=_wide(rows.dtype))
            self.paths.add("held")
        if self.held is None:
            self.lookups.append((index, rows))
        else:
            self._hold_lookup(index, rows)

    def squared_norms(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Squared norms [u], and the squared norms [u] that uncorrelated tokens would give.

        The second tells how far the Gram form's rounding errors can reach: see `fast.unsure`. It is None, for 0,
        where the norm was taken of the gradient itself.
        """
        if self.held is not None:
            for left, right in self.outers:
                self.held = self.held + batched_outer(left, right)
            for index, rows in self.lookups:
                self._hold_lookup(index, rows)
            self.outers, self.lookups = [], []
            squared = torch.linalg.vector_norm(self.held.flatten(1), dim=1).square()
            return squared, None
        outer, lookup = _concatenated(self.outers), _concatenated(self.lookups)
        squared, spread = (None, None) if outer is None else self._outer_norms(*outer)
        if lookup is not None:
            self.paths.add("gathered")
            gathered = _lookup_norms(*lookup)
            squared = gathered if squared is None else squared + gathered
        if outer is not None and lookup is not None:
            self.paths.add("exact cross term")
            squared = squared + 2 * _cross(*outer, *lookup)
        assert squared is not None  # gradients are made only to add something to them
        return squared, spread

    def add_weighted(self, target: torch.Tensor, factors: torch.Tensor) -> None:
        """target [*shape] += Σ over units of factors [u] · gradient."""
        if self.held is not None:
            target.view(-1).addmv_(self.held.flatten(1).t(), factors.to(self.held.dtype))
        for left, right in self.outers:
            add_outer(target, left, right, factors)
        for index, rows in self.lookups:
            target.index_add_(0, index.flatten(), (rows * factors[:, None, None]).to(target.dtype).flatten(0, 1))

    def zero(self, units: torch.Tensor) -> None:
        """Make the gradients of units, bool [u], exactly zero: a factor of 0 would leave 0 · inf = nan."""
        if self.held is not None:
            self.held[units] = 0
        self.outers = [(_zeroed(left, units), _zeroed(right, units)) for left, right in self.outers]
        self.lookups = [(index, _zeroed(rows, units)) for index, rows in self.lookups]

    def _hold_lookup(self, index: torch.Tensor, rows: torch.Tensor) -> None:
        assert self.held is not None
        first = torch.arange(len(index), device=index.device)[:, None] * self.shape[0]
        self.held.view(-1, self.shape[-1]).index_add_(
            0, (index + first).flatten(), rows.flatten(0, 1).to(self.held.dtype)
        )

    def _outer_norms(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        (u, n, p), q = left.shape, right.shape[2]
        # Bytes may favour factors (bfloat16) where arithmetic favours the gradient: then it is formed and dropped.
        gram = n * (p + q) <= p * q
        self.paths.add("Gram norm" if gram else "direct norm")
        chunk = max(1, GRAM_ELEMENTS // (n * n if gram else p * q))
        squared, spread = [], []
        for start in range(0, u, chunk):
            a, b = left[start : start + chunk], right[start : start + chunk]
            if gram:
                products, diagonal = gram_inner(a, b)
                squared.append(products)
                spread.append(diagonal)
            else:
                squared.append(torch.linalg.vector_norm(batched_outer(a, b).flatten(1), dim=1).square())
        return torch.cat(squared), torch.cat(spread) if spread else None


def holds(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether gradients left^T right take no more memory than the factors."""
    n, p, q = left.shape[1], left.shape[2], right.shape[2]
    return holds_gradient(n, p, q, left.element_size())


def holds_gradient(n: int, p: int, q: int, element_size: int) -> bool:
    """The same by sizes; a gradient is kept in float32 or wider."""
    return p * q * max(4, element_size) <= n * (p + q) * element_size


def _concatenated(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Terms of several calls of one layer are one term over the tokens of all."""
    if len(pairs) < 2:
        return pairs[0] if pairs else None
    return torch.cat([p[0] for p in pairs], 1), torch.cat([p[1] for p in pairs], 1)


def _lookup_norms(index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """‖Σ rows at index‖² a unit: rows that meet at one place are added first."""
    units = len(index)
    rows = rows.to(_wide(rows.dtype))
    place = index + torch.arange(units, device=index.device)[:, None] * (index.max() + 1)
    met, where = torch.unique(place.flatten(), return_inverse=True)
    added = rows.new_zeros(len(met), rows.shape[-1]).index_add_(0, where, rows.flatten(0, 1))
    squared = added.square().sum(1)
    owner = torch.div(met, index.max() + 1, rounding_mode="floor")
    return rows.new_zeros(units).index_add_(0, owner, squared)


def _cross(left: torch.Tensor, right: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Inner product a unit of left^T right and of rows at index: Σ_ts left[t, index_s] · ⟨right_t, rows_s⟩."""
    at_index = left.gather(2, index[:, None, :].expand(-1, left.shape[1], -1))
    return (at_index * batched_inner(right, rows)).sum((1, 2))


def _zeroed(tensor: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    return tensor.masked_fill(units.view(-1, *[1] * (tensor.ndim - 1)), 0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
