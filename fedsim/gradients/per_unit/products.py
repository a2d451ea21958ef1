"""Products and norms in batches, whose running sums are short enough for the clip."""

import torch

from fedsim.clip import CLIP_MARGIN
from fedsim.gradients.clipping import SMALLEST_LIMIT
from fedsim.gradients.model import wide_dtype

SPREAD_ALLOWED = 8
"""A squared norm is taken to be off by so many times eps · its spread at most."""
GRAM_BLOCK = 128
"""Tokens of a block of a Gram matrix, of which only those on and below the diagonal are computed."""
NORM_PIECE = 1024
"""Values of a row whose squares a CPU adds up in float32; the sums of pieces are added in float64."""
INNER_PIECE = 2048
"""Terms of an inner product that one matrix product adds up; see `batched_inner`."""
TOKEN_PIECE = 256
"""Tokens of a unit that one matrix product adds to the sum: running sums of float32 stay within 2⁻¹⁷ of the truth."""


def pieces(tensor: torch.Tensor, most: int, axis: int) -> tuple[torch.Tensor, ...]:
    """The tensor in pieces of at most so many along an axis; itself where it is no longer, which is most often."""
    return (tensor,) if tensor.shape[axis] <= most else torch.split(tensor, most, axis)


def end_to_end(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts of a tensor as one; a single one as it is, which is most often."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
    pairs = zip(pieces(left, piece, 2), pieces(right, piece, 2), strict=True)
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

    What entries lose to underflow is in the spread too: |l|² may vanish where |r|² makes much of it. Entries of LL^T
    and RR^T, of p and q features, are off by 2p and 2q smallest normal numbers at most (`underflow_spread`), and
    Σ_ts |⟨r_t, r_s⟩| ≤ n Σ_t |r_t|²; so the result is off by 2n (q · tr LL^T + p · tr RR^T) of them at most.
    """
    p, q = left.shape[2], right.shape[2]
    lost = underflow_spread(2 * left.shape[1] * p, wide_dtype(left.dtype))
    totals: list[torch.Tensor] = []
    spreads: list[torch.Tensor] = []
    step = max(GRAM_BLOCK, -(-left.shape[1] // 4))  # more than 4 blocks a side would save little more
    parts = list(zip(pieces(left, step, 1), pieces(right, step, 1), strict=True))
    shrink: list[torch.Tensor] = []
    for row, (a, b) in enumerate(parts):
        for column in range(row, -1, -1):  # the block on the diagonal first: it has the row's d_t
            products, others = batched_inner(a, parts[column][0]), batched_inner(b, parts[column][1])
            twice = row != column
            if not twice:  # while they are there by themselves
                of_left, of_right = products.diagonal(dim1=1, dim2=2), others.diagonal(dim1=1, dim2=2)
                traces = torch.add(of_right, of_left, alpha=q / p).sum(1)
            products.mul_(others)
            del others
            if not twice:
                own = products.diagonal(dim1=1, dim2=2)
                shrink.append(own.clamp(min=torch.finfo(own.dtype).tiny).pow(-0.25))
            total = products.sum((1, 2))
            totals.append(2 * total if twice else total)
            products.mul_(shrink[row][:, :, None]).mul_(shrink[column][:, None, :])
            spread = torch.linalg.vector_norm(products, dim=(1, 2)).square()
            spreads.append(2 * spread if twice else spread.add_(traces, alpha=lost))
    if len(totals) == 1:
        return totals[0], spreads[0]
    return torch.stack(totals).sum(0), torch.stack(spreads).sum(0)


def underflow_spread(numbers: float, dtype: torch.dtype) -> float:
    """What stands in a spread for an error of so many smallest normal numbers of a dtype.

    Each product, and each sum, may be off by one, where a device flushes what is smaller to 0.
    """
    limits = torch.finfo(dtype)
    return numbers * limits.tiny / (SPREAD_ALLOWED * limits.eps)


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


def _bmm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.dtype in (torch.float32, torch.float64):
        return torch.bmm(left, right.to(left.dtype))
    right = right.to(left.dtype)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def add_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool = False) -> None:
    """target [p, q] += left [p, n] right [n, q], accumulated in target's dtype.

    Args:
        first: Whether nothing was added before: what target holds, even nan, is not read.
    """
    before = 0 if first else 1
    if left.dtype == right.dtype == target.dtype:
        target.addmm_(left, right, beta=before)
    elif left.dtype == right.dtype and left.is_cuda:
        product = torch.mm(left, right, out_dtype=target.dtype)
        target.copy_(product) if first else target.add_(product)
    else:
        target.addmm_(left.to(target.dtype), right.to(target.dtype), beta=before)


def unsure(
    squared: torch.Tensor, spread: torch.Tensor, dtype: torch.dtype, least: float = SMALLEST_LIMIT
) -> torch.Tensor:
    """Where tokens cancel, or products underflow, so far that a norm may be off by more than CLIP_MARGIN / 2.

    Rounding errors reach about eps · `spread` of the squared norm (see `gram_inner` and `UnitGradients.squared_norms`
    for what a spread is), of which we allow for SPREAD_ALLOWED times. What is far below the least squared norm that is
    clipped to matters to no clip: so a gradient of which one factor is exactly zero is sure.

    Args:
        squared, spread: Same shape.
        dtype: In what products were added up.
        least: No more than any norm that is clipped to.

    Returns:
        bool, same shape.
    """
    allowed = CLIP_MARGIN / 2 * squared + CLIP_MARGIN / 16 * least**2
    return SPREAD_ALLOWED * torch.finfo(dtype).eps * spread > allowed
