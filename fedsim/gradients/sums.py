"""The one call: the clipped sum of many units' gradients."""

import logging
from typing import Literal

import numpy as np
import torch

from fedsim.clip import Clip
from fedsim.errors import InvalidInput
from fedsim.gradients.clipping import ClippedSum
from fedsim.gradients.fast import FastSum
from fedsim.gradients.local_steps import LocalSteps
from fedsim.gradients.objective import Objective
from fedsim.gradients.packing import token_budget
from fedsim.gradients.precision import check_deterministic, model_device
from fedsim.gradients.reference import clipped_units, reference_sum
from fedsim.gradients.tape import RowsMixedError
from fedsim.gradients.units import make_units
from fedsim.gradients.verify import why_reference
from fedsim.rows import TokenRows

log = logging.getLogger(__name__)


def clipped_sum(
    model: torch.nn.Module,
    rows: TokenRows,
    unit_ids: np.ndarray,
    clip: Clip,
    *,
    objective: Objective,
    weighting: str = "examples",
    weights: np.ndarray | None = None,
    method: Literal["fast", "reference"] = "fast",
    max_tokens: int | None = None,
    autocast: torch.dtype | None = None,
    local_steps: LocalSteps | None = None,
) -> ClippedSum:
    """Σ over units u of g_u, clipped: the gradient of the unit's weighted mean loss, brought to within the clip.

    Each block of g_u, all of it where the clip has no blocks, is multiplied by min(1, limit / norm), the norm being
    that of g_u ⊘ s in the block. With local steps g_u is θ − θ_K instead, how far the unit's own gradient descent goes
    from θ.

    A unit is what the guarantee protects together: a user's drawn examples (ULS), or one example (ELS). Adding or
    removing one unit changes each block of the sum by at most its limit, whatever the unit's data; a unit whose
    gradient is not finite, in any block, adds exactly zero and leaves the others as they are.

    Args:
        model: Any module whose rows are independent of each other, in evaluation mode (or in training mode with
            every dropout 0). Its parameters with requires_grad make up the gradient; it is left as it was.
        rows: The units' rows, ragged.
        unit_ids: Integer [rows], values 0..U-1. A value without rows is a unit with a zero gradient.
        clip: The norm, its order, scales and blocks. The sum is of unscaled g_u. The guarantee holds only for scales
            and blocks that do not depend on private data other than by noised releases. L1 norms need every unit's
            whole gradient: they take the reference path.
        objective: CausalLanguageModel() or SequenceClassification().
        weighting: "examples": a unit's loss is the mean over its rows of each row's mean label loss. "tokens": the
            mean over its labels. Rows that score no label are left out of either mean.
        weights: Non-negative relative weight of each row within its unit, float [rows]; None means equal.
        method: "fast": many units in one pass. "reference": one after the other by plain autograd.
        max_tokens: Tokens of one micro-batch, padding included; None chooses by device and memory.
        autocast: torch.bfloat16 to run the model in mixed precision; norms and sums stay float32. None: as it is.
        local_steps: Steps that each unit takes from θ, one unit after the other; losses are those at θ. None: none.

    Returns:
        The sum and, for each unit, its norm before the clip, its loss and whether it was finite.

    Raises:
        InvalidInput: An argument outside the above, a clip of other parameters, or a model with dropout on.
    """
    if method not in ("fast", "reference"):
        raise InvalidInput("method", method, "'fast' or 'reference'")
    if method == "fast" and clip.order == 2 and local_steps is None:
        check_deterministic(model)
        units = make_units(rows, unit_ids, objective, weighting, weights)
        budget = token_budget(model, model_device(model), max_tokens)
        asked = FastSum(model, rows, units, objective, clip, budget, autocast)
        if not why_reference(asked):
            try:
                return asked.run()
            except RowsMixedError as error:
                log.warning("%s takes the reference path for this call: %s", type(model).__name__, error)
    return reference_sum(
        clipped_units(
            model,
            rows,
            unit_ids,
            clip,
            objective=objective,
            weighting=weighting,
            weights=weights,
            max_tokens=max_tokens,
            autocast=autocast,
            local_steps=local_steps,
        )
    )
