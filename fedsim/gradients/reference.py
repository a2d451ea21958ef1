"""The reference: one unit after the other, plain autograd, obvious by reading."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from fedsim.clip import Clip
from fedsim.errors import Failure, InvalidInput
from fedsim.gradients.clipping import ClippedSum, ModelClip, is_finite
from fedsim.gradients.head import fused_loss
from fedsim.gradients.model import (
    ParameterLayout,
    accumulation_dtype,
    autocasting,
    check_deterministic,
    exact_products,
    model_device,
    pad_token_of,
    trainable_parameters,
)
from fedsim.gradients.objective import Objective
from fedsim.gradients.units import Units, make_units, split_rows, token_budget
from fedsim.rows import TokenRows


@dataclass(frozen=True, kw_only=True)
class LocalSteps:
    """K steps of gradient descent on a unit's loss, each on all the unit's rows, before the clip.

    That is DP-FedAvg (McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models"). Everything
    of a unit's is clipped together, once, after its last step.

    Attributes:
        steps: K, at least 1. With K = 1 and learning rate 1 the update is the gradient, up to rounding.
        learning_rate: Step size, a finite number above 0.

    Raises:
        InvalidInput: Either is outside the above.
    """

    steps: int
    learning_rate: float

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InvalidInput("local_steps.steps", self.steps, "at least 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InvalidInput("local_steps.learning_rate", self.learning_rate, "a finite number above 0")


def clipped_units(
    model: torch.nn.Module,
    rows: TokenRows,
    unit_ids: np.ndarray,
    clip: Clip,
    *,
    objective: Objective,
    weighting: str = "examples",
    weights: np.ndarray | None = None,
    max_tokens: int | None = None,
    autocast: torch.dtype | None = None,
    local_steps: LocalSteps | None = None,
) -> Iterator[tuple[int, torch.Tensor, float, float]]:
    """Each unit's clipped update, one by one, in order of unit.

    Arguments are those of `clipped_sum`.

    Yields:
        (unit, update [P], norm before the clip, loss): each block of the update is within its limit; all of it is
        exactly zero where the unit is not finite. The norm is that of `ClippedSum.norms`. The tensor is the caller's.

    Raises:
        Failure: The model fails on a unit's rows; or as for `clipped_sum`.
    """
    check_deterministic(model)
    layout = ParameterLayout.of(model)
    model_clip = ModelClip(clip, layout)
    units = make_units(rows, unit_ids, objective, weighting, weights)
    for unit in range(len(units)):
        gradient = partial(unit_gradient, model, rows, units, unit, objective, layout, max_tokens, autocast)
        with exact_products(model_device(model)):  # for a unit at a time: between two the settings are the caller's
            try:
                update, loss = (
                    gradient() if local_steps is None else local_update(model, layout, gradient, local_steps)
                )
            except (torch.OutOfMemoryError, MemoryError, InvalidInput, Failure):
                raise
            except Exception as error:
                raise Failure(
                    f"{type(model).__name__} failed in the forward or backward pass of a unit by itself: "
                    f"{str(error) or type(error).__name__}"
                ) from error
            norm, loss_before = float(model_clip.clip_(update)), float(loss)
        yield unit, update, norm, loss_before


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
    gradient = torch.zeros(layout.size, dtype=accumulation_dtype(parameters), device=device)
    loss = torch.zeros((), dtype=gradient.dtype, device=device)
    budget = token_budget(model, device, max_tokens, autocast)
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
        finite=is_finite(before),
    )


def local_update(
    model: torch.nn.Module,
    layout: ParameterLayout,
    gradient: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    local_steps: LocalSteps,
) -> tuple[torch.Tensor, torch.Tensor]:
    """θ − θ_K [P] of one unit, and its loss at θ; the model holds θ again when the call returns or raises.

    The update points as a gradient does: a server subtracts it.

    Args:
        gradient: The unit's gradient [P] and loss at the model's present parameters.
    """
    parameters = trainable_parameters(model)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    first_loss = None
    try:
        for _ in range(local_steps.steps):
            update, loss = gradient()
            first_loss = loss if first_loss is None else first_loss
            with torch.no_grad():
                for name, view in layout.views(update).items():
                    parameters[name].add_(view.to(parameters[name].dtype), alpha=-local_steps.learning_rate)
        with torch.no_grad():
            for name, view in layout.views(update).items():
                view.copy_(start[name] - parameters[name])
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
    assert first_loss is not None  # there is at least one step
    return update, first_loss
