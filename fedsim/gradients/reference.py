"""The reference: one unit after the other, plain autograd, obvious by reading."""

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch

from fedsim.gradients.clipping import ClippedSum, check_clip, clip_factors, flat_norm, inverse_scales
from fedsim.gradients.head import fused_loss
from fedsim.gradients.layout import ParameterLayout, trainable_parameters
from fedsim.gradients.local_steps import LocalSteps, local_update
from fedsim.gradients.objective import Objective
from fedsim.gradients.packing import pad_token_of, split_rows, token_budget
from fedsim.gradients.precision import accumulation_dtype, autocasting, check_deterministic, model_device
from fedsim.gradients.units import Units, make_units
from fedsim.rows import TokenRows


def clipped_units(
    model: torch.nn.Module,
    rows: TokenRows,
    unit_ids: np.ndarray,
    clip_norm: float,
    *,
    objective: Objective,
    weighting: str = "examples",
    weights: np.ndarray | None = None,
    scales: Mapping[str, float] | None = None,
    norm_order: int = 2,
    max_tokens: int | None = None,
    autocast: torch.dtype | None = None,
    local_steps: LocalSteps | None = None,
) -> Iterator[tuple[int, torch.Tensor, float, float]]:
    """Each unit's clipped update, one by one, in order of unit.

    Arguments are those of `clipped_sum`.

    Yields:
        (unit, update [P], norm before the clip, loss): the update's norm (L2, or L1 for norm_order=1; of Δ⊘s with
        scales) is at most clip_norm; it is exactly zero where the norm is not finite. The tensor is the caller's.
    """
    check_clip(clip_norm, norm_order)
    check_deterministic(model)
    layout = ParameterLayout.of(model)
    inverse = inverse_scales(layout, scales)
    units = make_units(rows, unit_ids, objective, weighting, weights)
    for unit in range(len(units)):
        gradient = partial(unit_gradient, model, rows, units, unit, objective, layout, max_tokens, autocast)
        update, loss = gradient() if local_steps is None else local_update(model, layout, gradient, local_steps)
        norm = clip_(update, layout, clip_norm, inverse, norm_order)
        yield unit, update, float(norm), float(loss)


def unit_gradient(
    model: torch.nn.Module,
    rows: TokenRows,
    units: Units,
    unit: int,
    objective: Objective,
    layout: ParameterLayout,
    max_tokens: int | None,
    autocast: torch.dtype | None,
    head: torch.nn.Linear | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A unit's gradient, [P] flat, and its loss; its rows pass in micro-batches whose gradients are added up.

    With `head`, the result of `plain_head`, the last layer and the loss are computed in chunks; by default not.
    """
    device = model_device(model)
    parameters = list(trainable_parameters(model).values())
    gradient = torch.zeros(layout.size, dtype=accumulation_dtype(model), device=device)
    loss = torch.zeros((), dtype=gradient.dtype, device=device)
    budget = token_budget(model, device, max_tokens)
    for part in split_rows(units, unit, budget):
        batch = objective.collate(rows, units.rows[part], device, pad_token_of(model))
        coefficients = torch.as_tensor(units.coefficients[part], dtype=gradient.dtype, device=device)
        with autocasting(device, autocast):
            if head is None:
                part_loss = (coefficients * objective.row_losses(model, batch).loss_sum).sum()
            else:
                part_loss, _ = fused_loss(model, head, batch, coefficients)
        pieces = torch.autograd.grad(part_loss, parameters, allow_unused=True)
        for view, piece in zip(layout.views(gradient).values(), pieces, strict=True):
            if piece is not None:
                view += piece
        loss += part_loss.detach()
    return gradient, loss


def clip_(
    update: torch.Tensor, layout: ParameterLayout, clip_norm: float, inverse: Mapping[str, float], norm_order: int
) -> torch.Tensor:
    """Clip an update [P] in place, to exactly zero if its norm is not finite; returns the norm before."""
    norm = flat_norm(layout.views(update), inverse, norm_order)
    factor, finite = clip_factors(norm, clip_norm)
    if finite:
        update *= factor
    else:
        update.zero_()
    return norm


def reference_sum(updates: Iterator[tuple[int, torch.Tensor, float, float]]) -> ClippedSum:
    """The sum of clipped units, with their norms and losses."""
    total, norms, losses = None, [], []
    for _, update, norm, loss in updates:
        total = update if total is None else total.add_(update)
        norms.append(norm)
        losses.append(loss)
    assert total is not None  # make_units refuses a call without rows
    before = torch.tensor(norms, dtype=total.dtype, device=total.device)
    return ClippedSum(
        total=total,
        norms=before,
        losses=torch.tensor(losses, dtype=total.dtype, device=total.device),
        finite=clip_factors(before, 1.0)[1],
    )
