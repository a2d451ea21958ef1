"""The one call: the clipped sum of many units' gradients."""

import logging
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch

from fedsim.errors import InvalidInput
from fedsim.gradients.clipping import ClippedSum, check_clip, inverse_scales
from fedsim.gradients.fast import FastSum
from fedsim.gradients.layout import ParameterLayout
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
    clip_norm: float,
    *,
    objective: Objective,
    weighting: str = "examples",
    weights: np.ndarray | None = None,
    method: Literal["fast", "reference"] = "fast",
    scales: Mapping[str, float] | None = None,
    norm_order: int = 2,
    max_tokens: int | None = None,
    autocast: torch.dtype | None = None,
    local_steps: LocalSteps | None = None,
) -> ClippedSum:
    """Σ over units u of g_u · min(1, clip_norm / ‖g_u‖), g_u the gradient of the unit's weighted mean loss.

    With local steps g_u is θ − θ_K instead, how far the unit's own gradient descent goes from θ.

    A unit is what the guarantee protects together: a user's drawn examples (ULS), or one example (ELS). Adding or
    removing one unit changes the sum by at most clip_norm, in the norm chosen, whatever its data; a unit whose
    gradient is not finite adds exactly zero and leaves the others as they are.

    Args:
        model: Any module whose rows are independent of each other, in evaluation mode (or in training mode with
            every dropout 0). Its parameters with requires_grad make up the gradient; it is left as it was.
        rows: The units' rows, ragged.
        unit_ids: Integer [rows], values 0..U-1. A value without rows is a unit with a zero gradient.
        clip_norm: C, a finite number above 0.
        objective: CausalLanguageModel() or SequenceClassification().
        weighting: "examples": a unit's loss is the mean over its rows of each row's mean label loss. "tokens": the
            mean over its labels. Rows that score no label are left out of either mean.
        weights: Non-negative relative weight of each row within its unit, float [rows]; None means equal.
        method: "fast": many units in one pass. "reference": one after the other by plain autograd.
        scales: s > 0 by parameter name, 1 where absent: the norm is that of Δ⊘s, the sum is of unscaled Δ.
            The guarantee holds only for scales that do not depend on private data other than by noised releases.
        norm_order: 2, or 1 for the L1 norm. L1 norms need every unit's whole gradient: they take the reference path.
        max_tokens: Tokens of one micro-batch, padding included; None chooses by device and memory.
        autocast: torch.bfloat16 to run the model in mixed precision; norms and sums stay float32. None: as it is.
        local_steps: Steps that each unit takes from θ, one unit after the other; losses are those at θ. None: none.

    Returns:
        The sum and, for each unit, its norm before the clip, its loss and whether it was finite.

    Raises:
        InvalidInput: An argument outside the above, or a model with dropout on.
    """
    if method not in ("fast", "reference"):
        raise InvalidInput("method", method, "'fast' or 'reference'")
    if method == "fast" and norm_order == 2 and local_steps is None:
        check_clip(clip_norm, norm_order)
        check_deterministic(model)
        units = make_units(rows, unit_ids, objective, weighting, weights)
        inverse = inverse_scales(ParameterLayout.of(model), scales)
        budget = token_budget(model, model_device(model), max_tokens)

        def fresh() -> FastSum:
            return FastSum(model, rows, units, objective, clip_norm, inverse, budget, autocast)

        asked = fresh()
        if not why_reference(asked, fresh):
            try:
                return asked.run()
            except RowsMixedError as error:
                log.warning("%s takes the reference path for this call: %s", type(model).__name__, error)
    return reference_sum(
        clipped_units(
            model,
            rows,
            unit_ids,
            clip_norm,
            objective=objective,
            weighting=weighting,
            weights=weights,
            scales=scales,
            norm_order=norm_order,
            max_tokens=max_tokens,
            autocast=autocast,
            local_steps=local_steps,
        )
    )
