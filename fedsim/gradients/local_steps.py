"""Several local steps a unit before the clip: DP-FedAvg (McMahan et al. 2018, "Learning Differentially Private
Recurrent Language Models")."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from fedsim.errors import InvalidInput
from fedsim.gradients.clipping import ClippedSum, check_clip, inverse_scales
from fedsim.gradients.layout import ParameterLayout, trainable_parameters
from fedsim.gradients.objective import Objective
from fedsim.gradients.precision import check_deterministic
from fedsim.gradients.reference import clip_, reference_sum, unit_gradient
from fedsim.gradients.units import make_units
from fedsim.rows import TokenRows


def clipped_local_updates(
    model: torch.nn.Module,
    rows: TokenRows,
    unit_ids: np.ndarray,
    clip_norm: float,
    *,
    objective: Objective,
    local_steps: int,
    local_learning_rate: float,
    weighting: str = "examples",
    weights: np.ndarray | None = None,
    scales: Mapping[str, float] | None = None,
    norm_order: int = 2,
    max_tokens: int | None = None,
    autocast: torch.dtype | None = None,
) -> ClippedSum:
    """Σ over units of clip(θ − θ_K), θ_K after K steps of gradient descent on the unit's loss, each from θ.

    Every step is on all the unit's rows. Everything of a unit's is clipped together, once, after its last step. The
    update points as a gradient does: a server subtracts it. The model holds θ again when the call returns or raises.

    Args:
        local_steps: K, at least 1. With K = 1 and learning rate 1 the update is the gradient, up to rounding.
        local_learning_rate: Step size, a finite number above 0.
        (others): As for `clipped_sum`. Losses are those at θ, before the first local step.

    Raises:
        InvalidInput: An argument outside the above.
    """
    updates = clipped_local_units(
        model,
        rows,
        unit_ids,
        clip_norm,
        objective=objective,
        local_steps=local_steps,
        local_learning_rate=local_learning_rate,
        weighting=weighting,
        weights=weights,
        scales=scales,
        norm_order=norm_order,
        max_tokens=max_tokens,
        autocast=autocast,
    )
    return reference_sum(updates)


def clipped_local_units(
    model: torch.nn.Module,
    rows: TokenRows,
    unit_ids: np.ndarray,
    clip_norm: float,
    *,
    objective: Objective,
    local_steps: int,
    local_learning_rate: float,
    weighting: str = "examples",
    weights: np.ndarray | None = None,
    scales: Mapping[str, float] | None = None,
    norm_order: int = 2,
    max_tokens: int | None = None,
    autocast: torch.dtype | None = None,
) -> Iterator[tuple[int, torch.Tensor, float, float]]:
    """The units of `clipped_local_updates` one by one: (unit, clipped θ − θ_K [P], norm before the clip, loss).

    The model holds θ whenever the caller has control.
    """
    check_clip(clip_norm, norm_order)
    check_deterministic(model)
    if local_steps < 1:
        raise InvalidInput("local_steps", local_steps, "at least 1")
    if not (math.isfinite(local_learning_rate) and local_learning_rate > 0):
        raise InvalidInput("local_learning_rate", local_learning_rate, "a finite number above 0")
    layout = ParameterLayout.of(model)
    inverse = inverse_scales(layout, scales)
    units = make_units(rows, unit_ids, objective, weighting, weights)
    parameters = trainable_parameters(model)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for unit in range(len(units)):
        first_loss = None
        try:
            for _ in range(local_steps):
                gradient, loss = unit_gradient(model, rows, units, unit, objective, layout, max_tokens, autocast)
                first_loss = loss if first_loss is None else first_loss
                with torch.no_grad():
                    for name, view in layout.views(gradient).items():
                        parameters[name].add_(view.to(parameters[name].dtype), alpha=-local_learning_rate)
            with torch.no_grad():
                for name, view in layout.views(gradient).items():
                    view.copy_(start[name] - parameters[name])
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(start[name])
        norm = clip_(gradient, layout, clip_norm, inverse, norm_order)
        assert first_loss is not None
        yield unit, gradient, float(norm), float(first_loss)
