"""Factors of many parameters for one launch: where they lie, in a table that a kernel reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Pair = tuple[torch.Tensor, torch.Tensor]
"""Factors of the gradients of one parameter, which are left^T right: left [u, n, p] and right [u, n, q]."""


@dataclass(frozen=True)
class Shape:
    """What the pairs of one launch have in common.

    Attributes:
        units, tokens, p, q: Of both factors.
        distances: Between units and between tokens, of left and of right, in values.
    """

    units: int
    tokens: int
    p: int
    q: int
    distances: tuple[int, int, int, int]


def by_shape(pairs: Sequence[Pair]) -> dict[Shape, list[tuple[int, Pair]]]:
    """Pairs and their numbers, those of one shape together; their addresses are such as `aligned` leaves."""
    found: dict[Shape, list[tuple[int, Pair]]] = {}
    for number, (left, right) in enumerate(pairs):
        left, right = aligned(left), aligned(right)
        units, tokens, p = left.shape
        distances = left.stride(0), left.stride(1), right.stride(0), right.stride(1)
        shape = Shape(units, tokens, p, right.shape[2], distances)
        found.setdefault(shape, []).append((number, (left, right)))
    return found


def addresses(tensors: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """int64 [items, tensors of an item] on their device: where each begins."""
    table = torch.tensor([[t.data_ptr() for t in item] for item in tensors], dtype=torch.int64)
    first = tensors[0][0]
    return table.pin_memory().to(first.device, non_blocking=True) if first.is_cuda else table


def aligned(factor: torch.Tensor) -> torch.Tensor:
    """The factor, or a copy where the device's copy engine cannot read it.

    It asks for addresses and distances that are multiples of 16 bytes, and for distances that are not 0.
    """
    if factor.data_ptr() % 16 or any(distance % 8 or not distance for distance in factor.stride()[:2]):
        units, tokens, width = factor.shape
        factor = factor.new_zeros(units, tokens, width + -width % 8)[..., :width].copy_(factor)
    return factor


def make_room(device: torch.device) -> None:
    """Let kernels that are launched from here on keep their descriptors of blocks in the device's memory."""
    import triton  # here, because pairs are known without it

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
