"""‖L_u^T R_u‖² of each unit from Gram matrices that are never stored."""

import torch
import triton
import triton.language as tl

from fedsim.gradients.kernels.weighted import blocks_of

TILE = 128
"""Tokens of a side of the piece of a Gram matrix that one program forms."""
FEATURES = 64
"""Features of one step of the product."""
PIECE = 1024
"""Features that one running sum of the matrix units adds up; sums of pieces are added in float32, to the nearest."""


def gram_norms(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared norms [u] and spreads [u] as of `unit_gradients.gram_inner`, float64 sums of float32 pieces.

    Args:
        left, right: bfloat16 [u, n, p] and [u, n, q], the last axis contiguous.
    """
    (units, tokens, p), q = left.shape, right.shape[2]
    one, other = (blocks_of(factor, TILE, FEATURES) for factor in (left, right))
    side = triton.cdiv(tokens, TILE)
    below = side * (side - 1) // 2
    own = torch.empty(units, tokens, device=left.device, dtype=torch.float32)
    sums = torch.empty(2, units, side + below, device=left.device, dtype=torch.float32)
    for diagonal, first, pieces in ((True, 0, side), (False, side, below)):  # these need what those left
        if pieces:
            _gram[(units, pieces)](
                one, other, own, sums, p, q, tokens, first, side + below,
                DIAGONAL=diagonal, TILE=TILE, FEATURES=FEATURES, PIECE=PIECE, EXACT=not left.is_cuda,
                num_warps=8, num_stages=4,
            )  # fmt: skip
    squared, spread = sums.sum(2, dtype=torch.float64)
    return squared, spread


@triton.jit
def _inner(
    factor, width, unit, up, down,
    DIAGONAL: tl.constexpr, TILE: tl.constexpr, FEATURES: tl.constexpr, PIECE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Inner products of the tokens of a unit from `up` on with those from `down` on."""
    whole = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, width, PIECE):
        piece = tl.zeros((TILE, TILE), tl.float32)
        for k in range(start, min(start + PIECE, width), FEATURES):
            a = factor.load([unit, up, k]).reshape(TILE, FEATURES)
            b = a if DIAGONAL else factor.load([unit, down, k]).reshape(TILE, FEATURES)
            if EXACT:  # the interpreter's products of bfloat16 are wrong
                a, b = a.to(tl.float32), b.to(tl.float32)
            piece = tl.dot(a, b.T, piece)
        whole += piece
    return whole


@triton.jit(do_not_specialize=["tokens", "first", "pieces"])
def _gram(
    left, right, own, sums, p, q, tokens, first, pieces,
    DIAGONAL: tl.constexpr, TILE: tl.constexpr, FEATURES: tl.constexpr, PIECE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    unit, number = tl.program_id(0), tl.program_id(1)
    if DIAGONAL:
        i, j = number, number
    else:  # number counts the pieces below the diagonal, row after row
        i, before = 1, 0
        while before + i <= number:
            before += i
            i += 1
        j = number - before
    up, down = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    products = _inner(left, p, unit, i * TILE, j * TILE, DIAGONAL, TILE, FEATURES, PIECE, EXACT)
    products *= _inner(right, q, unit, i * TILE, j * TILE, DIAGONAL, TILE, FEATURES, PIECE, EXACT)
    base = unit * tokens
    if DIAGONAL:
        square = tl.where(tl.arange(0, TILE)[:, None] == tl.arange(0, TILE)[None, :], products, 0.0)
        mine, theirs = tl.sum(square, 1), tl.sum(square, 0)
        tl.store(own + base + up, mine, mask=up < tokens)
    else:
        mine = tl.load(own + base + up, mask=up < tokens, other=0.0)
        theirs = tl.load(own + base + down, mask=down < tokens, other=0.0)
    tiny = 1.1754943508222875e-38  # the smallest normal float32
    shrink = tl.rsqrt(tl.sqrt(tl.maximum(mine, tiny)))[:, None] * tl.rsqrt(tl.sqrt(tl.maximum(theirs, tiny)))[None, :]
    scaled = products * shrink
    times = 1.0 if DIAGONAL else 2.0  # what lies above the diagonal is the same
    place = sums + unit * pieces + first + number
    tl.store(place, times * tl.sum(tl.sum(products, 1), 0))
    tl.store(place + tl.num_programs(0) * pieces, times * tl.sum(tl.sum(scaled * scaled, 1), 0))
