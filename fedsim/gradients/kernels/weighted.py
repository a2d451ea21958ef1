"""Σ_u f_u · L_u^T R_u in one product: each unit's part is formed by itself, scaled in float32, and added."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, COLUMNS = 128, 256
"""Of the target that one program of 256 threads holds, twice: a unit's part, and the sum."""
TOKENS = 64
"""Tokens of one step of the product."""
PIECE = 4
"""Steps that one running sum of the matrix units adds up, as of `unit_gradients.TOKEN_PIECE` tokens. They round
towards zero: a longer one would shorten what is added late, and a unit whose tokens cancel would reach too far."""
PROGRAMS = 132
"""Programs at least, where units allow: the multiprocessors of a Hopper GPU."""


def weighted_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factors: torch.Tensor) -> None:
    """target [p, q] += Σ_u factors[u] · left[u]^T right[u].

    A unit's tokens are added up in the matrix units' float32, PIECE steps at a time; each piece is multiplied by the
    unit's factor and added, rounded to the nearest: a factor of any number of bits is as good as one of few. Where the
    target is too small to keep the device busy, parts of the units are added up side by side, and their sums in order:
    the result is the same from call to call.

    Args:
        target: float32, contiguous; otherwise the call fails.
        left, right: bfloat16 [u, n, p] and [u, n, q], the last axis contiguous.
        factors: [u].
    """
    assert target.dtype == torch.float32
    assert target.is_contiguous()
    (units, tokens, p), q = left.shape, right.shape[2]
    tiles = triton.cdiv(p, ROWS) * triton.cdiv(q, COLUMNS)
    share = triton.cdiv(units, max(1, min(units, PROGRAMS // tiles)))
    parts = triton.cdiv(units, share)
    out = target if parts == 1 else torch.empty(parts, p, q, device=target.device, dtype=torch.float32)
    _weighted[(tiles, parts)](
        blocks_of(left, TOKENS, ROWS), blocks_of(right, TOKENS, COLUMNS), factors.to(torch.float32), out, p, q, units,
        tokens, share, ADD=parts == 1, ROWS=ROWS, COLUMNS=COLUMNS, TOKENS=TOKENS, PIECE=PIECE,
        EXACT=not left.is_cuda, num_warps=8, num_stages=3,
    )  # fmt: skip
    if parts > 1:
        target += out.sum(0)


def blocks_of(factor: torch.Tensor, tokens: int, features: int) -> TensorDescriptor:
    """[u, n, d] as what a kernel may load blocks of [1, tokens, features] from; outside it they are 0.

    The device's copy engine asks for addresses and distances that are multiples of 16 bytes and not 0; a factor that
    has others is copied.
    """
    if factor.data_ptr() % 16 or any(distance % 8 or not distance for distance in factor.stride()[:2]):
        width = factor.shape[2]
        factor = torch.nn.functional.pad(factor, (0, -width % 8))[..., :width]
    return TensorDescriptor(factor, list(factor.shape), list(factor.stride()), [1, tokens, features])


@triton.jit(do_not_specialize=["units", "tokens", "share"])  # ragged users would have it compiled over and over
def _weighted(
    left, right, factors, out, p, q, units, tokens, share,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PIECE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    tile, part_number = tl.program_id(0), tl.program_id(1)
    down, across = tl.cdiv(p, ROWS), tl.cdiv(q, COLUMNS)
    # Programs that run at the same time take a square of tiles, so that they read the same rows of both factors.
    band = 8 * across
    first = tile // band * 8
    height = min(down - first, 8)
    row = (first + tile % band % height) * ROWS
    column = tile % band // height * COLUMNS
    per_unit = tl.cdiv(tokens, TOKENS)
    begin = part_number * share
    end = min(begin + share, units)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    unit_part = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(begin * per_unit, end * per_unit):  # one loop, which the compiler can keep filled
        unit = i // per_unit
        token = i % per_unit * TOKENS
        a = left.load([unit, token, row]).reshape(TOKENS, ROWS)
        b = right.load([unit, token, column]).reshape(TOKENS, COLUMNS)
        if EXACT:  # the interpreter's products of bfloat16 are wrong
            a, b = a.to(tl.float32), b.to(tl.float32)
        unit_part = tl.dot(a.T, b, unit_part)
        if (i % per_unit == per_unit - 1) | (i % per_unit % PIECE == PIECE - 1):
            total += tl.load(factors + unit) * unit_part
            unit_part = tl.zeros((ROWS, COLUMNS), tl.float32)
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = (rows < p)[:, None] & (columns < q)[None, :]
    places = out + (part_number.to(tl.int64) * p + rows.to(tl.int64)[:, None]) * q + columns[None, :]
    if ADD:
        total += tl.load(places, mask=inside, other=0.0)
    tl.store(places, total, mask=inside)
