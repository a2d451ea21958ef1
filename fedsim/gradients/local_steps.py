"""Several local steps a unit before the clip: DP-FedAvg (McMahan et al. 2018, "Learning Differentially Private
Recurrent Language Models")."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedsim.errors import InvalidInput
from fedsim.gradients.layout import ParameterLayout, trainable_parameters


@dataclass(frozen=True, kw_only=True)
class LocalSteps:
    """K steps of gradient descent on a unit's loss, each on all the unit's rows.

    Everything of a unit's is clipped together, once, after its last step.

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
