"""The one call for a group of processes: the clipped sum of many units of a model that none of them holds whole."""

from typing import Literal

import numpy as np
import torch

from fedsim.clip import Clip
from fedsim.errors import Failure, InvalidInput
from fedsim.gradients.model import check_deterministic, exact_products
from fedsim.gradients.sharded.model import ShardedModel
from fedsim.gradients.sharded.passes import OnGrid, ShardedPasses, ShardedSum
from fedsim.gradients.sharded.trial import paths_one_by_one, why_one_by_one
from fedsim.gradients.sums import chosen_reference
from fedsim.gradients.units import make_units, token_budget
from fedsim.rows import TokenRows


def sharded_sum(
    sharded: ShardedModel,
    rows: TokenRows,
    unit_ids: np.ndarray,
    clip: Clip,
    *,
    weighting: str = "examples",
    weights: np.ndarray | None = None,
    method: Literal["fast", "reference"] = "fast",
    max_tokens: int | None = None,
    autocast: torch.dtype | None = None,
    on_grid: OnGrid | None = None,
) -> ShardedSum:
    """`clipped_sum` over a group of processes, each of which gives the same arguments.

    Micro-batches are those of one process with padded rows, dealt out to the processes. A unit's rows stay with one of
    them, its norm is computed there, of its own activations and output gradients, and each block's weighted sum is
    formed there and at once reduced and scattered (`ShardedTotal`). What a unit adds is what it adds in one process,
    up to the order of additions; with `on_grid` to the bit.

    A process that fails on its rows leaves the others waiting for it: whoever catches an error here must end the
    process, or at least its process group, upon which the others raise.

    Args:
        sharded: The model.
        rows, unit_ids, clip, weighting, weights, method, max_tokens, autocast: As for `clipped_sum`.
        on_grid: From a unit's clipped update to whole steps of a public grid, of which the sum then is; each unit
            passes by itself.

    Returns:
        This process's part of the sum; norms, losses and what is finite of all units.

    Raises:
        InvalidInput: As for `clipped_sum`.
        Failure: The model fails on a unit's rows, another process of the group is gone, or as for `clipped_sum`.
    """
    if method not in ("fast", "reference"):
        raise InvalidInput("method", method, "'fast' or 'reference'")
    device = sharded.device
    with exact_products(device), torch.inference_mode(False), torch.enable_grad():
        check_deterministic(sharded.model)
        units = make_units(rows, unit_ids, sharded.objective, weighting, weights)
        reason = "exact sums take each unit's update by itself" if on_grid else chosen_reference(method, clip, None)
        budget = sharded.least(token_budget(sharded.model, device, max_tokens, autocast))
        try:
            if not reason:
                asked = ShardedPasses(sharded, rows, units, clip, budget, autocast)
                reason = why_one_by_one(asked)
                if not reason:
                    return asked.sharded_sum()
            one_by_one = ShardedPasses(sharded, rows, units, clip, budget, autocast, one_by_one=True, on_grid=on_grid)
            paths_one_by_one(one_by_one, reason)
            return one_by_one.sharded_sum()
        except (torch.OutOfMemoryError, MemoryError, InvalidInput, Failure):
            raise
        except Exception as error:
            raise Failure(f"a process of the group failed: {str(error) or type(error).__name__}") from error
