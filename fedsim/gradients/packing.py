"""Micro-batches: rows packed by length under a token budget."""

import numpy as np
import torch

from fedsim.errors import InvalidInput
from fedsim.gradients.units import Units

CPU_TOKENS = 512


def token_budget(model: torch.nn.Module, device: torch.device, max_tokens: int | None) -> int:
    """Tokens, padding included, that one micro-batch may hold."""
    if max_tokens is None:
        return CPU_TOKENS
    if max_tokens < 1:
        raise InvalidInput("max_tokens", max_tokens, "at least 1, or None to choose by device")
    return max_tokens


def split_rows(units: Units, unit: int, budget: int) -> list[np.ndarray]:
    """Positions into units.rows of one unit's rows, in parts of similar lengths that each fit the budget.

    A row longer than the budget is a part of its own.
    """
    positions = np.arange(units.offsets[unit], units.offsets[unit + 1])
    positions = positions[np.argsort(units.lengths[positions], kind="stable")]
    parts: list[np.ndarray] = []
    start = 0
    for stop in range(1, len(positions) + 1):
        # Sorted by length, so the next row would set the padded length of all.
        if stop == len(positions) or (stop + 1 - start) * units.lengths[positions[stop]] > budget:
            parts.append(positions[start:stop])
            start = stop
    return parts


def pad_token_of(model: torch.nn.Module) -> int:
    """The token that fills rows: the model's own where it has one."""
    return getattr(getattr(model, "config", None), "pad_token_id", None) or 0
