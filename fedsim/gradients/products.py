"""Matrix products of kept activations, accumulated in float32 even where the operands are bfloat16."""

import torch

GRAM_ELEMENTS = 2**24
"""Elements of one batch of Gram matrices at most: 64 MiB of float32."""
GRAM_BLOCK = 128
"""Tokens of a block of a Gram matrix, of which only those on and below the diagonal are computed."""
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
    parts = list(zip(left.split(step, 1), right.split(step, 1), strict=True))
    for row, (a, b) in enumerate(parts):
        for column, (c, d) in enumerate(parts[: row + 1]):
            products = batched_inner(a, c).mul_(batched_inner(b, d))
            total = total + products.sum((1, 2)) * (1 if row == column else 2)
            if row == column:
                diagonal = diagonal + products.diagonal(dim1=1, dim2=2).sum(1)
    return total, diagonal


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
