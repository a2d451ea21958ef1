"""y = x W^T + b (torch's Linear) and y = x W + b (Hugging Face's Conv1D)."""

from typing import Any

import torch

from fedsim.gradients.tape import Record, Tape


def rule(module: Any) -> tuple[str, Record] | None:
    """The rule for a Linear or Conv1D, None for other layers."""
    if type(module).forward is torch.nn.Linear.forward:
        return "linear", linear
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and weight is not None and weight.ndim == 2:
        return "linear", conv1d
    return None


def linear(tape: Tape, module: Any, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> None:
    """Weight [out, in]: gradient^T x. Bias [out]: the sum of gradient."""
    gradient = tape.by_row(gradient)
    tape.outer(module.weight, gradient, tape.by_row(inputs[0]).to(gradient.dtype))
    tape.summed(module.bias, gradient)


def conv1d(tape: Tape, module: Any, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> None:
    """Weight [in, out]: x^T gradient. Bias [out]: the sum of gradient."""
    gradient = tape.by_row(gradient)
    tape.outer(module.weight, tape.by_row(inputs[0]).to(gradient.dtype), gradient)
    tape.summed(module.bias, gradient)
