"""Σ_u f_u · L_u^T R_u in one product: each unit's part is formed by itself, scaled in float32, and added."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fedsim.gradients.kernels.tables import Pair, addresses, by_shape, make_room

ROWS, COLUMNS = 128, 256
"""Of the target that one program of 256 threads holds, twice: a unit's part, and the sum."""
TOKENS = 64
"""Tokens of one step of the product."""
PIECE = 4
"""Steps that one running sum of the matrix units adds up, as of `products.TOKEN_PIECE` tokens. They round
towards zero: a longer one would shorten what is added late, and a unit whose tokens cancel would reach too far."""
PROGRAMS = 132
"""Programs at least, where units allow: the multiprocessors of a Hopper GPU."""
VALUES = 1024
"""Of a target to which one program adds what others left."""


def weighted_products(
    targets: Sequence[torch.Tensor], pairs: Sequence[Pair], factors: torch.Tensor, programs: int | None = None
) -> None:
    """target [p, q] += Σ_u factors[u] · left[u]^T right[u], of each target and its pair; a launch for all of a shape.

    A unit's tokens are added up in the matrix units' float32, PIECE steps at a time; each piece is multiplied by the
    unit's factor and added, rounded to the nearest: a factor of any number of bits is as good as one of few. Where the
    targets are too small to keep the device busy, parts of the units are added up side by side, and their sums in
    order: the result is the same from call to call.

    Args:
        targets: float32, contiguous, of fewer than 2³¹ values, no two of them overlapping.
        pairs: bfloat16, the last axis contiguous.
        factors: [u].
        programs: How many are to run at least; PROGRAMS by default.
    """
    programs = PROGRAMS if programs is None else programs
    assert all(target.dtype == torch.float32 and target.is_contiguous() for target in targets)
    factors = factors.to(torch.float32).contiguous()
    make_room(factors.device)
    for shape, members in by_shape(pairs).items():
        out = [targets[number] for number, _ in members]
        table = addresses([(*pair, target) for (_, pair), target in zip(members, out, strict=True)])
        tiles = triton.cdiv(shape.p, ROWS) * triton.cdiv(shape.q, COLUMNS)
        share = triton.cdiv(shape.units, max(1, min(shape.units, programs // (tiles * len(out)))))
        parts = triton.cdiv(shape.units, share)
        size = shape.p * shape.q
        room = factors if parts == 1 else torch.empty(len(out), parts, size, device=factors.device)
        _weighted[(tiles, parts, len(out))](
            table, factors, room, shape.p, shape.q, shape.units, shape.tokens, share, *shape.distances,
            ADD=parts == 1, ROWS=ROWS, COLUMNS=COLUMNS, TOKENS=TOKENS, PIECE=PIECE, EXACT=not factors.is_cuda,
            num_warps=8, num_stages=4,
        )  # fmt: skip
        if parts > 1:
            _added[(triton.cdiv(size, VALUES), len(out))](table, room, size, parts, VALUES=VALUES, num_warps=4)


@triton.jit(
    do_not_specialize=["units", "tokens", "share", "left_unit", "right_unit"]
)  # else ragged users recompile it
def _weighted(
    table, factors, room, p, q, units, tokens, share, left_unit, left_token, right_unit, right_token,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PIECE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    tile, part_number, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    half = tl.pointer_type(tl.bfloat16)
    left = tl.make_tensor_descriptor(
        tl.load(table + 3 * item).to(half), [units, tokens, p], [left_unit, left_token, 1], [1, TOKENS, ROWS]
    )
    right = tl.make_tensor_descriptor(
        tl.load(table + 3 * item + 1).to(half), [units, tokens, q], [right_unit, right_token, 1], [1, TOKENS, COLUMNS]
    )
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
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = (rows < p)[:, None] & (columns < q)[None, :]
    places = rows[:, None] * q + columns[None, :]
    if ADD:  # read first: at the end there would be no registers left for it
        out = tl.load(table + 3 * item + 2).to(tl.pointer_type(tl.float32))
        total = tl.load(out + places, mask=inside, other=0.0)
    else:
        out = room + (item.to(tl.int64) * tl.num_programs(1) + part_number) * p * q
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
    tl.store(out + places, total, mask=inside)


@triton.jit(do_not_specialize=["parts"])
def _added(table, room, size, parts, VALUES: tl.constexpr):
    """target += the parts that were added up side by side, one after the other."""
    item = tl.program_id(1)
    place = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    inside = place < size
    start = room + item.to(tl.int64) * parts * size
    total = tl.zeros((VALUES,), tl.float32)
    for part in range(parts):
        total += tl.load(start + part * size + place, mask=inside, other=0.0)
    target = tl.load(table + 3 * item + 2).to(tl.pointer_type(tl.float32)) + place
    tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)
