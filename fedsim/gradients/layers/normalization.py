"""y = w · x̂ + b along the last axis: LayerNorm, and the many RMSNorm classes of model libraries."""

from typing import Any

import torch
from torch.func import functional_call

from fedsim.gradients.tape import Record, Tape


def rule(module: Any) -> tuple[str, Record] | None:
    """The rule for a normalisation over the last axis, None for other layers."""
    if type(module).forward is torch.nn.LayerNorm.forward and len(module.normalized_shape) == 1:
        return "normalization", layer_norm
    parameters = dict(module.named_parameters())
    if "RMSNorm" in type(module).__name__ and list(parameters) == ["weight"] and parameters["weight"].ndim == 1:
        return "normalization", rms_norm
    return None


def layer_norm(tape: Tape, module: Any, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> None:
    """Weight: the sum of gradient · x̂. Bias: the sum of gradient."""
    normal = torch.nn.functional.layer_norm(inputs[0].to(gradient.dtype), module.normalized_shape, eps=module.eps)
    tape.summed(module.weight, tape.by_row(gradient * normal))
    tape.summed(module.bias, tape.by_row(gradient))


def rms_norm(tape: Tape, module: Any, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> None:
    """The output is affine in the weight, so x̂ is its difference between weights of 1 and 0.

    Asking the module keeps its own rounding and its own convention: some multiply by w, some by 1 + w.
    """
    one = functional_call(module, {"weight": torch.ones_like(module.weight)}, inputs)
    zero = functional_call(module, {"weight": torch.zeros_like(module.weight)}, inputs)
    tape.summed(module.weight, tape.by_row(gradient * (one - zero)))
