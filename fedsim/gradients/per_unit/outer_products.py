"""Gradients left^T right over a unit's vectors: their norms, inner products and weighted sum, taken of the factors."""

import torch

from fedsim.gradients.kernels import gram_norms_of, usable, weighted_products
from fedsim.gradients.model import wide_dtype
from fedsim.gradients.per_unit.products import (
    TOKEN_PIECE,
    add_product,
    batched_inner,
    batched_outer,
    end_to_end,
    gram_inner,
    pieces,
    squared_row_norms,
)
from fedsim.gradients.rows.segments import Segments, Term

GRAM_ELEMENTS = 2**24
"""Elements of one batch of Gram matrices at most: 64 MiB of float32."""
FACTOR_BITS = 9
"""Significant bits of a clip factor whose product with a bfloat16 (8 bits) is two bfloat16s exactly: see `_scaled`."""


def longest_gram(p: int, q: int) -> int:
    """Vectors up to which a unit's norm is found with less arithmetic from Gram matrices than from the gradient.

    Bytes may favour factors (bfloat16) where arithmetic favours the gradient: then it is formed and dropped.
    """
    return p * q // (p + q)


def least_held(p: int, q: int, element_size: int) -> int:
    """Vectors from which on a gradient left^T right takes no more memory than its factors; it is float32 or wider."""
    return -(-p * q * max(4, element_size) // ((p + q) * element_size))


def add_outer(
    target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factors: torch.Tensor, segments: Segments
) -> None:
    """target [p, q] += Σ_u factors[u] · left_u^T right_u, for left [M, p] and right [M, q] of the units' segments."""
    if target.dtype == torch.float32 and usable(left, right):
        for bucket in segments.buckets:
            pair = bucket.of(left, zeroed=True), bucket.of(right)
            weighted_products([target], [pair], factors[bucket.units])
        return
    each = segments.each(factors)[:, None]
    scale_left = left.shape[-1] <= right.shape[-1]  # the smaller one is cheaper to scale
    for scaled in _scaled(left if scale_left else right, each):
        one, other = (scaled, right) if scale_left else (left, scaled)
        for piece in segments.pieces(TOKEN_PIECE):
            add_product(target, one[piece].t(), other[piece])


def outer_products(segments: Segments, factors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """left^T right of each unit, [u, p, q]."""
    left, right = factors
    buckets = segments.buckets_of(max(left.shape[1], right.shape[1]))
    parts = [batched_outer(b.of(left, zeroed=True), b.of(right)) for b in buckets]
    return end_to_end(parts)


def bucket_norms(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, str]:
    """‖left^T right‖² of units with as many vectors, left [u, n, p] and right [u, n, q].

    Returns:
        Squared norms and their spreads (as of `gram_inner`), [u], and the name of the way.
    """
    (u, n, p), q = left.shape, right.shape[2]
    gram = n <= longest_gram(p, q)
    path = "Gram norm" if gram else "direct norm"
    if gram and usable(left, right):
        squares, spreads = gram_norms_of([(left, right)])
        return squares[0], spreads[0], path
    chunk = max(1, GRAM_ELEMENTS // (n * n if gram else p * q))
    squared, spread = [], []
    for start in range(0, u, chunk):
        a, b = left[start : start + chunk], right[start : start + chunk]
        if gram:
            products, diagonal = gram_inner(a, b)
            squared.append(products)
            spread.append(diagonal)
        else:
            # As add_outer adds it up, so that the sum is of what the norm is of.
            pairs = zip(pieces(a, TOKEN_PIECE, 1), pieces(b, TOKEN_PIECE, 1), strict=True)
            gradient = sum(batched_outer(c, d) for c, d in pairs)
            assert isinstance(gradient, torch.Tensor)
            squared.append(squared_row_norms(gradient.flatten(1)))
            spread.append((_lengths(a) * _lengths(b)).square().sum(1))
    return end_to_end(squared), end_to_end(spread), path


def _lengths(vectors: torch.Tensor) -> torch.Tensor:
    """The lengths of vectors [u, n, d], [u, n]; none less than what squares lose to underflow may make of it."""
    wide = wide_dtype(vectors.dtype)
    least = (2 * vectors.shape[2] * torch.finfo(wide).tiny) ** 0.5
    lengths: torch.Tensor = torch.linalg.vector_norm(vectors, dim=2, dtype=wide)
    return lengths.clamp(min=least)


def at_words(left: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """left [u, n, p] of each token t at the place that each token s of its unit names, index [u, m]: [u, n, m]."""
    return left.gather(2, index[:, None, :].expand(-1, left.shape[1], -1))


def inner_with_rows(found: torch.Tensor, right: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Σ_ts left[t, index_s] · ⟨right_t, rows_s⟩ of each unit, [u], with left at these places, [u, n, m], given."""
    return (found * batched_inner(right.to(rows.dtype), rows)).sum((1, 2))


def cross(outer: Term, lookup: Term) -> torch.Tensor:
    """Inner product a unit of left^T right and of rows at index: Σ_ts left[t, index_s] · ⟨right_t, rows_s⟩."""
    (segments, (left, right)), (others, (index, rows)) = outer, lookup
    found = []
    for bucket in segments.buckets_of(left.shape[1]):
        other = bucket if others is segments else others.bucket(bucket.units.start, bucket.units.stop)
        places = at_words(bucket.of(left, zeroed=True), other.of(index))
        found.append(inner_with_rows(places, bucket.of(right), other.of(rows, zeroed=True)))
    return end_to_end(found)


def zeroed(tensor: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """tensor [M, d] with some vectors, bool [M], exactly zero."""
    return tensor.masked_fill(vectors[:, None], 0)


def _scaled(tensor: torch.Tensor, factors: torch.Tensor) -> list[torch.Tensor]:
    """tensor [M, d] times factors [M, 1], as terms whose sum is that product, rounded at most as float32 is.

    Rounding a scaled bfloat16 tensor to bfloat16 would move a clipped unit's norm by up to 2⁻⁸ and so past the
    clip; the part lost in rounding is therefore a second term. A product of 8 and FACTOR_BITS = 9 significant bits
    has 17; to the nearest 8, the rest has no more than 8: with factors of so few bits the two terms are exact.
    """
    product = tensor.to(factors.dtype) * factors
    if tensor.dtype != torch.bfloat16:
        return [product]
    rounded = product.to(tensor.dtype)
    return [rounded, (product - rounded).to(tensor.dtype)]
