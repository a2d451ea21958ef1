"""Gradients of units, kept as factors where those are smaller than the gradients themselves."""

from collections.abc import Iterator, Sequence

import torch

from fedsim.gradients.kernels import gram_norms_of, usable, weighted_products
from fedsim.gradients.model import wide_dtype

GRAM_ELEMENTS = 2**24
"""Elements of one batch of Gram matrices at most: 64 MiB of float32."""
GRAM_BLOCK = 128
"""Tokens of a block of a Gram matrix, of which only those on and below the diagonal are computed."""
NORM_PIECE = 1024
"""Values of a row whose squares a CPU adds up in float32; the sums of pieces are added in float64."""
INNER_PIECE = 2048
"""Terms of an inner product that one matrix product adds up; see `batched_inner`."""
TOKEN_PIECE = 256
"""Tokens of a unit that one matrix product adds to the sum: running sums of float32 stay within 2⁻¹⁷ of the truth."""
FACTOR_BITS = 9
"""Significant bits of a clip factor whose product with a bfloat16 (8 bits) is two bfloat16s exactly: see `_scaled`."""


def batched_outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[u, n, p], [u, n, q] → [u, p, q], one left^T right a unit."""
    return _bmm(left.transpose(1, 2), right)


def batched_inner(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[u, n, d], [u, m, d] → [u, n, m], all inner products within a unit.

    One product of few tokens and 50,000 features keeps one running sum an entry, and falls short by 10⁻⁴ where the
    features are alike. So features are taken in pieces: of INNER_PIECE, or of TOKEN_PIECE in a GPU's float32, where
    nothing else divides a running sum.
    """
    piece = TOKEN_PIECE if left.is_cuda and left.dtype == torch.float32 else INNER_PIECE
    pairs = zip(torch.split(left, piece, 2), torch.split(right, piece, 2), strict=True)
    a, b = next(pairs)
    products = _bmm(a, b.transpose(1, 2))
    for a, b in pairs:
        products += _bmm(a, b.transpose(1, 2))
    return products


def gram_inner(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """⟨LL^T, RR^T⟩ = ‖L^T R‖² of each unit, [u], and how far its rounding errors can add up, its spread, [u].

    Gram matrices are symmetric: blocks off the diagonal count twice and are computed once.

    With P the products of entries and d_t = P_tt = |l_t|²|r_t|², an entry's error is about eps · (d_t d_s)^½. Errors
    of unlike tokens are independent; those of a token said m times are the same error m² times. Both are what
    Σ_ts P_ts² / (d_t d_s)^½ sees: it is Σ_t d_t for tokens that are unlike, and m times that for tokens said m times.
    """
    total = spread = torch.zeros((), device=left.device)
    step = max(GRAM_BLOCK, -(-left.shape[1] // 4))  # more than 4 blocks a side would save little more
    parts = list(zip(torch.split(left, step, 1), torch.split(right, step, 1), strict=True))
    shrink: list[torch.Tensor] = []
    for row, (a, b) in enumerate(parts):
        for column in range(row, -1, -1):  # the block on the diagonal first: it has the row's d_t
            products = batched_inner(a, parts[column][0]).mul_(batched_inner(b, parts[column][1]))
            if row == column:
                own = products.diagonal(dim1=1, dim2=2)
                shrink.append(own.clamp(min=torch.finfo(own.dtype).tiny).pow(-0.25))
            times = 1 if row == column else 2
            total = total + products.sum((1, 2)) * times
            products.mul_(shrink[row][:, :, None]).mul_(shrink[column][:, None, :])
            spread = spread + torch.linalg.vector_norm(products, dim=(1, 2)).square() * times
    return total, spread


def squared_row_norms(rows: torch.Tensor) -> torch.Tensor:
    """‖row‖² of each row of [u, n], float64, off by less than CLIP_MARGIN / 2 whatever the values' sizes relatively.

    On a CPU torch adds a row's squares in a few running sums (8 lanes at least), float32 as the row is: of millions of
    values the later ones are rounded away, and the norm falls short by 2e-4 at 8 million. A piece of NORM_PIECE
    values puts 128 into a lane, each rounded by at most 2⁻²⁴ of the sum. That costs what one sum does; a conversion to
    float64, thirty times as much. A GPU's sums are trees.
    """
    squared: torch.Tensor
    if rows.is_cuda or rows.dtype == torch.float64 or rows.shape[1] <= NORM_PIECE:
        squared = torch.linalg.vector_norm(rows, dim=1).double().square()
        return squared
    whole = rows.shape[1] - rows.shape[1] % NORM_PIECE
    pieces = torch.linalg.vector_norm(rows[:, :whole].reshape(len(rows), -1, NORM_PIECE), dim=2)
    squared = pieces.double().square().sum(1)
    if whole < rows.shape[1]:
        squared += torch.linalg.vector_norm(rows[:, whole:], dim=1).double().square()
    return squared


def add_outer(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factors: torch.Tensor) -> None:
    """target [p, q] += Σ_u factors[u] · left[u]^T right[u], for left [u, n, p] and right [u, n, q]."""
    if target.dtype == torch.float32 and usable(left, right):
        weighted_products([target], [(left, right)], factors)
        return
    scale_left = left.shape[-1] <= right.shape[-1]  # the smaller one is cheaper to scale
    for scaled in _scaled(left if scale_left else right, factors):
        one, other = (scaled, right) if scale_left else (left, scaled)
        for a, b in token_pieces(one, other):
            add_product(target, a.flatten(0, 1).t(), b.flatten(0, 1))


def token_pieces(left: torch.Tensor, right: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """[u, n, p] and [u, n, q] in pieces of so few tokens that one running sum may add them up."""
    yield from zip(torch.split(left, TOKEN_PIECE, 1), torch.split(right, TOKEN_PIECE, 1), strict=True)


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
        gradients = gradients.to(wide_dtype(gradients.dtype))
        self.held = gradients if self.held is None else self.held + gradients

    def add_outer(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add left^T right, left [u, n, p] and right [u, n, q]; of unlike dtypes the narrower is widened."""
        if left.dtype != right.dtype:  # else the norm would be of a rounding of what is added
            wide = torch.promote_types(left.dtype, right.dtype)
            left, right = left.to(wide), right.to(wide)
        if holds(left, right):
            self.add_held(batched_outer(left, right))
        else:
            self.outers.append((left, right))

    def add_lookup(self, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Add rows [u, m, q] at index [u, m] along the first axis."""
        if self.held is None and self.shape[0] <= index.shape[1]:
            self.held = rows.new_zeros(len(rows), *self.shape, dtype=wide_dtype(rows.dtype))
            self.paths.add("held")
        if self.held is None:
            self.lookups.append((index, rows))
        else:
            self._hold_lookup(index, rows)

    def only_held(self) -> bool:
        """Whether the gradients themselves are all there is."""
        return self.held is not None and not self.outers and not self.lookups

    def held_elements(self) -> int:
        """Values of the gradients held."""
        return 0 if self.held is None else self.held.numel()

    def take_held(self) -> torch.Tensor:
        """The gradients held, [u, *shape], which are the caller's from now on."""
        assert self.held is not None
        held, self.held = self.held, None
        return held

    def gram_pair(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The factors of which a kernel is to find the norm in Gram form; None where another way is right."""
        if self.held is not None or self.lookups or not self.outers or not all(usable(*pair) for pair in self.outers):
            return None
        if len(self.outers) > 1:
            self.outers = [pair for pair in (_concatenated(self.outers),) if pair is not None]
        left, right = self.outers[0]
        if not gram_form(left, right):
            return None
        self.paths.add("Gram norm")
        return left, right

    def squared_norms(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Squared norms [u], and their spreads [u]: how far rounding errors can reach (`gram_inner`, `fast.unsure`).

        The spread is None, for 0, where the norm was taken of the gradient itself. Of an outer part and rows added to
        it, errors reach as far as both are long, however short they leave their sum: an error of the cross term is
        eps · |L[t, x_s]||r_t||e_s|, and these add up to no more than eps · (spread of the outer part · ‖rows‖²)^½.
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
            lookup = (lookup[0], _merged(*lookup))
            self.lookups = [lookup]
            gathered = squared_row_norms(lookup[1].flatten(1))
            squared = gathered if squared is None else squared + gathered
        assert squared is not None  # gradients are made only to add something to them
        if outer is not None and lookup is not None:
            self.paths.add("exact cross term")
            squared = squared + 2 * _cross(*outer, *lookup)
            assert spread is not None
            spread = (spread.double().sqrt() + gathered.sqrt()).square()
        return squared, spread

    def add_weighted(
        self, target: torch.Tensor, factors: torch.Tensor, without: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    ) -> None:
        """target [*shape] += Σ over units of factors [u] · gradient.

        Args:
            without: Those of `outers` that the caller adds.
        """
        if self.held is not None:
            target.view(-1).addmv_(self.held.flatten(1).t(), factors.to(self.held.dtype))
        for left, right in self.outers:
            if not any(left is pair[0] and right is pair[1] for pair in without):
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

    def _outer_norms(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (u, n, p), q = left.shape, right.shape[2]
        gram = gram_form(left, right)
        self.paths.add("Gram norm" if gram else "direct norm")
        if gram and usable(left, right):
            return tuple(found[0] for found in gram_norms_of([(left, right)]))  # type: ignore[return-value]
        chunk = max(1, GRAM_ELEMENTS // (n * n if gram else p * q))
        squares, spreads = [], []
        for start in range(0, u, chunk):
            a, b = left[start : start + chunk], right[start : start + chunk]
            if gram:
                products, diagonal = gram_inner(a, b)
                squares.append(products)
                spreads.append(diagonal)
            else:
                # As add_outer adds it up, so that the sum is of what the norm is of.
                gradient = sum(batched_outer(c, d) for c, d in token_pieces(a, b))
                assert isinstance(gradient, torch.Tensor)
                squares.append(squared_row_norms(gradient.flatten(1)))
                lengths = [torch.linalg.vector_norm(x, dim=2, dtype=wide_dtype(x.dtype)) for x in (a, b)]
                spreads.append((lengths[0] * lengths[1]).square().sum(1))
        return torch.cat(squares), torch.cat(spreads)


def gram_form(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether the norm is found with less arithmetic from Gram matrices than from the gradients.

    Bytes may favour factors (bfloat16) where arithmetic favours the gradient: then it is formed and dropped.
    """
    n, p, q = left.shape[1], left.shape[2], right.shape[2]
    return n * (p + q) <= p * q


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


def _merged(index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """rows [u, m, q], those of a unit that meet at one place of index [u, m] added into the first; 0 in the others.

    Added up once, so that the norm is of exactly what the sum adds: 4,096 equal rows added to a table one after the
    other are off by 6 · 10⁻⁵, and by another amount when they are scaled first.
    """
    place = index + torch.arange(len(index), device=index.device)[:, None] * (index.max() + 1)
    # Sorted rather than made unique, whose number of places a GPU would have to be waited for.
    ordered, positions = torch.sort(place.flatten(), stable=True)
    changes = torch.diff(ordered, prepend=ordered[:1]) != 0
    run = changes.cumsum(0)
    first = torch.full_like(positions, len(positions)).scatter_reduce_(0, run, positions, "amin")
    where = torch.empty_like(positions).scatter_(0, positions, first[run])
    wide = rows.to(wide_dtype(rows.dtype)).flatten(0, 1)
    return torch.zeros_like(wide).index_add_(0, where, wide).view(rows.shape)


def _cross(left: torch.Tensor, right: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Inner product a unit of left^T right and of rows at index: Σ_ts left[t, index_s] · ⟨right_t, rows_s⟩."""
    at_index = left.gather(2, index[:, None, :].expand(-1, left.shape[1], -1))
    return (at_index * batched_inner(right.to(rows.dtype), rows)).sum((1, 2))


def _zeroed(tensor: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    return tensor.masked_fill(units.view(-1, *[1] * (tensor.ndim - 1)), 0)
