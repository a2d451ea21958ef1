"""‖L_u^T R_u‖² of each unit from Gram matrices that are never stored."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fedsim.gradients.kernels.tables import Pair, addresses, by_shape, make_room
from fedsim.gradients.per_unit.products import underflow_spread

TILE = 128
"""Tokens of a side of the piece of a Gram matrix that one program forms."""
FEATURES = 64
"""Features of one step of the product."""
PIECE = 1024
"""Features that one running sum of the matrix units adds up; sums of pieces are added in float32, to the nearest."""


def gram_norms_of(pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared norms and spreads as of `products.gram_inner`, float64 sums of float32 pieces; one launch for all
    pairs of a shape, and another where a unit has more tokens than a tile.

    Args:
        pairs: bfloat16, of equally many units, the last axis contiguous.

    Returns:
        Both [pairs, u].
    """
    device, units = pairs[0][0].device, len(pairs[0][0])
    make_room(device)
    found: list[torch.Tensor] = [torch.empty(0)] * len(pairs)
    for shape, members in by_shape(pairs).items():
        items = len(members)
        table = addresses([pair for _, pair in members])
        side = triton.cdiv(shape.tokens, TILE)
        below = side * (side - 1) // 2
        lost = underflow_spread(2 * shape.tokens, torch.float32)
        own = torch.empty(items, units, shape.tokens, device=device, dtype=torch.float32)
        sums = torch.empty(2, items, units, side + below, device=device, dtype=torch.float32)
        for diagonal, first, pieces in ((True, 0, side), (False, side, below)):  # these need what those left
            if pieces:
                _gram[(items * units, pieces)](
                    table, own, sums, shape.p, shape.q, units, shape.tokens, first, side + below, *shape.distances,
                    lost, DIAGONAL=diagonal, TILE=TILE, FEATURES=FEATURES, PIECE=PIECE, EXACT=not own.is_cuda,
                    num_warps=8, num_stages=4,
                )  # fmt: skip
        for (number, _), each in zip(members, sums.sum(3, dtype=torch.float64).unbind(1), strict=True):
            found[number] = each  # an index into one tensor would have to be brought to the device, and waited for
    squared, spread = torch.stack(found, 1)
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


@triton.jit(do_not_specialize=["units", "tokens", "first", "pieces", "left_unit", "right_unit"])
def _gram(
    table, own, sums, p, q, units, tokens, first, pieces, left_unit, left_token, right_unit, right_token, lost,
    DIAGONAL: tl.constexpr, TILE: tl.constexpr, FEATURES: tl.constexpr, PIECE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    place, number = tl.program_id(0), tl.program_id(1)
    item, unit = place // units, place % units
    half = tl.pointer_type(tl.bfloat16)
    left = tl.make_tensor_descriptor(
        tl.load(table + 2 * item).to(half), [units, tokens, p], [left_unit, left_token, 1], [1, TILE, FEATURES]
    )
    right = tl.make_tensor_descriptor(
        tl.load(table + 2 * item + 1).to(half), [units, tokens, q], [right_unit, right_token, 1], [1, TILE, FEATURES]
    )
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
    if DIAGONAL:
        square = tl.arange(0, TILE)[:, None] == tl.arange(0, TILE)[None, :]
        traces = q * tl.sum(tl.sum(tl.where(square, products, 0.0), 1), 0)
    others = _inner(right, q, unit, i * TILE, j * TILE, DIAGONAL, TILE, FEATURES, PIECE, EXACT)
    if DIAGONAL:
        traces += p * tl.sum(tl.sum(tl.where(square, others, 0.0), 1), 0)
    products *= others
    base = place * tokens
    if DIAGONAL:
        own_products = tl.where(square, products, 0.0)
        mine, theirs = tl.sum(own_products, 1), tl.sum(own_products, 0)
        tl.store(own + base + up, mine, mask=up < tokens)
    else:
        mine = tl.load(own + base + up, mask=up < tokens, other=0.0)
        theirs = tl.load(own + base + down, mask=down < tokens, other=0.0)
    tiny = 1.1754943508222875e-38  # the smallest normal float32
    shrink = tl.rsqrt(tl.sqrt(tl.maximum(mine, tiny)))[:, None] * tl.rsqrt(tl.sqrt(tl.maximum(theirs, tiny)))[None, :]
    scaled = products * shrink
    times = 1.0 if DIAGONAL else 2.0  # what lies above the diagonal is the same
    out = sums + place * pieces + first + number
    tl.store(out, times * tl.sum(tl.sum(products, 1), 0))
    spread = times * tl.sum(tl.sum(scaled * scaled, 1), 0)
    if DIAGONAL:
        spread += lost * traces
    tl.store(out + tl.num_programs(0) * pieces, spread)
