"""Gradients of units, kept as factors where those are smaller than the gradients themselves."""

import torch

from fedsim.gradients.clipping import ModelClip
from fedsim.gradients.units import Group

GRAM_ELEMENTS = 2**24
"""Elements of one batch of Gram matrices at most: 64 MiB of float32."""
GRAM_BLOCK = 128
"""Tokens of a block of a Gram matrix, of which only those on and below the diagonal are computed."""
NORM_PIECE = 1024
"""Values of a row whose squares a CPU adds up in float32; the sums of pieces are added in float64."""
FACTOR_BITS = 9
"""Significant bits of a clip factor whose product with a bfloat16 (8 bits) is two bfloat16s exactly: see `_scaled`."""


def batched_outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[u, n, p], [u, n, q] → [u, p, q], one left^T right a unit."""
    return _bmm(left.transpose(1, 2), right)


def batched_inner(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[u, n, d], [u, m, d] → [u, n, m], all inner products within a unit."""
    return _bmm(left, right.transpose(1, 2))


def gram_inner(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """⟨LL^T, RR^T⟩ = ‖L^T R‖² of each unit, [u], and the part of it that lies on the diagonal, Σ_t |l_t|²|r_t|².

    Gram matrices are symmetric: blocks off the diagonal count twice and are computed once.
    """
    total = diagonal = torch.zeros((), device=left.device)
    step = max(GRAM_BLOCK, -(-left.shape[1] // 4))  # more than 4 blocks a side would save little more
    parts = list(zip(torch.split(left, step, 1), torch.split(right, step, 1), strict=True))
    for row, (a, b) in enumerate(parts):
        for column, (c, d) in enumerate(parts[: row + 1]):
            products = batched_inner(a, c).mul_(batched_inner(b, d))
            total = total + products.sum((1, 2)) * (1 if row == column else 2)
            if row == column:
                diagonal = diagonal + products.diagonal(dim1=1, dim2=2).sum(1)
    return total, diagonal


def squared_row_norms(rows: torch.Tensor) -> torch.Tensor:
    """‖row‖² of each row of [u, n], in their dtype, off by less than CLIP_MARGIN / 2 whatever the values.

    On a CPU torch adds a row's squares in a few running sums (8 lanes at least), float32 as the row is: of millions of
    values the later ones are rounded away, and the norm falls short by 2e-4 at 8 million. A piece of NORM_PIECE
    values puts 128 into a lane, each rounded by at most 2⁻²⁴ of the sum. A GPU's sums are trees.
    """
    squared: torch.Tensor
    if rows.is_cuda or rows.dtype == torch.float64 or rows.shape[1] <= NORM_PIECE:
        squared = torch.linalg.vector_norm(rows, dim=1).square()
        return squared
    whole = rows.shape[1] - rows.shape[1] % NORM_PIECE
    pieces = torch.linalg.vector_norm(rows[:, :whole].reshape(len(rows), -1, NORM_PIECE), dim=2)
    squared = pieces.double().square().sum(1)
    if whole < rows.shape[1]:
        squared += torch.linalg.vector_norm(rows[:, whole:], dim=1).double().square()
    return squared.to(rows.dtype)


def add_outer(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factors: torch.Tensor) -> None:
    """target [p, q] += Σ_u factors[u] · left[u]^T right[u], for left [u, n, p] and right [u, n, q]."""
    scale_left = left.shape[-1] <= right.shape[-1]  # the smaller one is cheaper to scale
    for scaled in _scaled(left if scale_left else right, factors):
        one, other = (scaled, right) if scale_left else (left, scaled)
        add_product(target, one.flatten(0, 1).t(), other.flatten(0, 1))


def _scaled(tensor: torch.Tensor, factors: torch.Tensor) -> list[torch.Tensor]:
    """tensor [u, n, d] times factors [u], as terms whose sum is that product, rounded at most as float32 is.

    Rounding a scaled bfloat16 tensor to bfloat16 would move a clipped unit's norm by up to 2⁻⁸ and so past the
    clip; the part lost in rounding is therefore a second term. A product of 8 and FACTOR_BITS = 9 significant bits
    has 17; to the nearest 8, the rest has no more than 8: with factors of so few bits the two terms are exact.
    """
    product = tensor.to(factors.dtype) * factors[:, None, None]
    if tensor.dtype != torch.bfloat16:
        return [product]
    rounded = product.to(tensor.dtype)
    return [rounded, (product - rounded).to(tensor.dtype)]


def _bmm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.dtype in (torch.float32, torch.float64):
        return torch.bmm(left, right.to(left.dtype))
    right = right.to(left.dtype)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def add_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """target [p, q] += left [p, n] right [n, q], accumulated in target's dtype."""
    if left.dtype == right.dtype == target.dtype:
        target.addmm_(left, right)
    elif left.dtype == right.dtype and left.is_cuda:
        target += torch.mm(left, right, out_dtype=target.dtype)
    else:
        target.addmm_(left.to(target.dtype), right.to(target.dtype))


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
            return squared_row_norms(self.held.flatten(1)), None
        outer, lookup = _concatenated(self.outers), _concatenated(self.lookups)
        squared, spread = (None, None) if outer is None else self._outer_norms(*outer)
        if lookup is not None:
            self.paths.add("gathered")
            gathered = _lookup_norms(*lookup)
            squared = gathered if squared is None else squared + gathered
        assert squared is not None  # gradients are made only to add something to them
        if outer is not None and lookup is not None:
            self.paths.add("exact cross term")
            squared = squared + 2 * _cross(*outer, *lookup)
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
                squared.append(squared_row_norms(batched_outer(a, b).flatten(1)))
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
    # One after the other, and there may be thousands: in float64, so that the sum falls short by nothing that counts.
    return rows.new_zeros(units, dtype=torch.float64).index_add_(0, owner, squared.double())


def _cross(left: torch.Tensor, right: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Inner product a unit of left^T right and of rows at index: Σ_ts left[t, index_s] · ⟨right_t, rows_s⟩."""
    at_index = left.gather(2, index[:, None, :].expand(-1, left.shape[1], -1))
    return (at_index * batched_inner(right, rows)).sum((1, 2))


def _zeroed(tensor: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    return tensor.masked_fill(units.view(-1, *[1] * (tensor.ndim - 1)), 0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class GroupGradients:
    """The gradients of a group's u units: the norms of their blocks, and their weighted sum.

    A model has many one-dimensional parameters (biases, normalisation weights) and each is small. Those of one block
    are laid side by side, one matrix [u, sizes together]: a few kernels in all, where one by one each would take a
    few.

    Args:
        group: The units.
        gradients: By parameter name.
        clip: Says which parameters belong together, and what each is divided by.
    """

    def __init__(self, group: Group, gradients: dict[str, UnitGradients], clip: ModelClip) -> None:
        self.units = group.units
        self.clip = clip
        vectors = {name: g.held for name, g in gradients.items() if len(g.shape) == 1 and g.held is not None}
        self.names: dict[int, list[str]] = {}
        for name in vectors:
            self.names.setdefault(clip.block[name], []).append(name)
        self.sizes = {name: held.shape[1] for name, held in vectors.items()}
        self.vectors = {b: torch.cat([vectors[name] for name in names], 1) for b, names in self.names.items()}
        self.matrices = {name: g for name, g in gradients.items() if name not in vectors}
        self._known_paths = {name: gradients[name].paths for name in vectors}

    @property
    def paths(self) -> dict[str, set[str]]:
        """How each parameter's norms were formed, by its name."""
        return self._known_paths | {name: gradients.paths for name, gradients in self.matrices.items()}

    def squared_norms(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """By block, squared norms [u] and spreads [u] as of UnitGradients, of gradients divided by their scales.

        Blocks of which the group has no gradient are left out.
        """
        squared: dict[int, list[torch.Tensor]] = {}
        spread: dict[int, list[torch.Tensor]] = {}
        for block in self.vectors:
            squared.setdefault(block, []).append(squared_row_norms(self._scaled_vectors(block)))
        for name, gradients in self.matrices.items():
            block, power = self.clip.block[name], self.clip.inverse[name] ** 2
            squares, spreads = gradients.squared_norms()
            squared.setdefault(block, []).append(squares * power)
            if spreads is not None:
                spread.setdefault(block, []).append(spreads * power)
        sums = {block: torch.stack(parts).sum(0, dtype=torch.float64) for block, parts in squared.items()}
        return {
            block: (
                total,
                torch.stack(spread[block]).sum(0, dtype=torch.float64) if block in spread else torch.zeros_like(total),
            )
            for block, total in sums.items()
        }

    def add_weighted(self, targets: dict[str, torch.Tensor], factors: torch.Tensor) -> None:
        """targets[name] += Σ over units of factors [blocks, u] of the parameter's block · gradient."""
        for name, gradients in self.matrices.items():
            gradients.add_weighted(targets[name], factors[self.clip.block[name]])
        for block, vectors in self.vectors.items():
            added = vectors.t() @ factors[block].to(vectors.dtype)
            names = self.names[block]
            for name, part in zip(names, torch.split(added, [self.sizes[name] for name in names]), strict=True):
                targets[name] += part

    def zero(self, units: torch.Tensor) -> None:
        """Make the gradients of units, bool [u], exactly zero: a factor of 0 would leave 0 · inf = nan."""
        for gradients in self.matrices.values():
            gradients.zero(units)
        for vectors in self.vectors.values():
            vectors[units] = 0

    def _scaled_vectors(self, block: int) -> torch.Tensor:
        vectors, names, inverse = self.vectors[block], self.names[block], self.clip.inverse
        if all(inverse[name] == 1 for name in names):
            return vectors
        parts = torch.split(vectors, [self.sizes[name] for name in names], 1)
        return torch.cat([part * inverse[name] for name, part in zip(names, parts, strict=True)], 1)
