"""Any layer at all: run again for the rows of each unit, with plain autograd."""

from typing import Any

import torch

from fedsim.gradients.tape import Record, RowsMixedError, Tape


def rule(module: torch.nn.Module) -> tuple[str, Record]:
    """The rule that fits every layer whose inputs and output have the rows first."""
    return f"generic ({type(module).__name__})", generic


def generic(tape: Tape, module: Any, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> None:
    """Each unit's gradients of the layer's own parameters are formed and held."""
    own = [p for p in module.parameters(recurse=False) if tape.wants(p)]
    if len(gradient) != tape.rows:
        raise RowsMixedError(f"{type(module).__name__} returns {len(gradient)} rows for {tape.rows}")
    per_group: list[list[tuple[torch.Tensor, ...]]] = []
    hooks, module._forward_hooks = module._forward_hooks, type(module._forward_hooks)()
    required = [p.requires_grad for p in own]
    try:
        for parameter in own:
            parameter.requires_grad_(True)
        for group in tape.groups:
            per_group.append([])
            for start in range(group.rows.start, group.rows.stop, group.rows_per_unit):
                rows = slice(start, start + group.rows_per_unit)
                with torch.enable_grad():
                    output = module(*(x[rows] if len(x) == tape.rows else x for x in inputs))
                per_group[-1].append(
                    torch.autograd.grad(output, own, gradient[rows], allow_unused=True, materialize_grads=True)
                )
    finally:
        module._forward_hooks = hooks
        for parameter, was in zip(own, required, strict=True):
            parameter.requires_grad_(was)
    for number, units in enumerate(per_group):
        for parameter, gradients in zip(own, zip(*units, strict=True), strict=True):
            tape.at(number, parameter).add_held(torch.stack(gradients), "held, recomputed unit by unit")
