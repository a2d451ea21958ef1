"""Micro-batches: rows packed by length under a token budget."""

import numpy as np
import torch

from fedsim.errors import InvalidInput
from fedsim.gradients.units import Units

CPU_TOKENS = 1024
"""On a CPU larger micro-batches fall out of its caches and gain nothing."""
GPU_TOKENS = 65536


def token_budget(model: torch.nn.Module, device: torch.device, max_tokens: int | None) -> int:
    """Tokens, padding included, that one micro-batch may hold.

    On a GPU the choice is half of the free memory by a generous estimate of what a token leaves behind; should it
    still be too much, the fast path halves it and goes on.

    Raises:
        InvalidInput: max_tokens below 1.
    """
    if max_tokens is not None:
        if max_tokens < 1:
            raise InvalidInput("max_tokens", max_tokens, "at least 1, or None to choose by device")
        return max_tokens
    if device.type != "cuda":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(min(GPU_TOKENS, max(1, free / 2 / token_bytes(model))))


def token_bytes(model: torch.nn.Module) -> int:
    """A generous estimate of the bytes that one token's activations and their gradients take in a pass."""
    widths = sum(sum(p.shape) for p in model.parameters() if p.ndim == 2)
    # Inputs, outputs and their gradients, and about as much again in functions without parameters.
    return 4 * 4 * widths


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


def pack_units(units: Units, budget: int) -> tuple[list[np.ndarray], list[int]]:
    """Units that share a micro-batch, and units that get micro-batches of their own.

    Units of like rows are put together, so that little is padded. A unit is alone if two of it would not fit.
    """
    counts = units.counts
    longest = np.zeros(len(units), dtype=np.int64)
    np.maximum.at(longest, np.repeat(np.arange(len(units)), counts), units.lengths)
    present = np.flatnonzero(counts)
    large = 2 * counts * longest > budget
    order = present[~large[present]]
    order = order[np.lexsort((counts[order], longest[order]))]
    together: list[np.ndarray] = []
    start = rows = 0
    for place, unit in enumerate(order):
        # Sorted by length, so this unit's longest row is the padded length of all.
        if (rows + counts[unit]) * longest[unit] > budget:
            together.append(order[start:place])
            start, rows = place, 0
        rows += counts[unit]
    if start < len(order):
        together.append(order[start:])
    return together, present[large[present]].tolist()


def pad_token_of(model: torch.nn.Module) -> int:
    """The token that fills rows: the model's own where it has one."""
    return getattr(getattr(model, "config", None), "pad_token_id", None) or 0
