"""Layers that are run again in the backward pass, to ask them what their inputs and output gradients do not tell."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fedsim.gradients.tape import Given, RowsMixedError, Tape

AGAIN = "held, recomputed unit by unit"
"""What is said of the parameters of a layer that was run again for each unit."""


def generic(tape: Tape, module: Any, given: Given, gradient: Any) -> None:
    """Any layer whose inputs and outputs have the rows first: run again for each unit's rows, with plain autograd.

    Each unit's gradients of the layer's own parameters are formed and held.
    """
    own = {name: p for name, p in module.named_parameters(recurse=False) if tape.wants(p)}
    copies = {name: p.detach().requires_grad_() for name, p in own.items()}
    if tape.packed:
        raise RowsMixedError(f"{type(module).__name__} is run again row by row, which packed ones are not")
    things, spec = tree_flatten((given.args, given.named))
    gradients = gradient if isinstance(gradient, tuple) else (gradient,)
    alone = len(tape.segments) == 1
    of_things = [0 if alone or not isinstance(x, torch.Tensor) else tape.per_row(x) for x in things]
    of_outputs = [len(x) // tape.rows if x.ndim else 0 for x in gradients]
    if any(len(x) != each * tape.rows for x, each in zip(gradients, of_outputs, strict=True)):
        shapes = [tuple(x.shape) for x in gradients]
        raise RowsMixedError(f"{type(module).__name__} returns tensors without rows", f"{shapes} for {tape.rows}")
    per_unit: list[tuple[torch.Tensor, ...]] = []
    with without_hooks(module), tape.pausing():
        for start, stop in pairwise(tape.segments.offsets.tolist()):
            part = [x[start * n : stop * n] if n else x for x, n in zip(things, of_things, strict=True)]
            args, named = tree_unflatten(part, spec)
            with torch.enable_grad():
                output = functional_call(module, copies, args, named)
            returned = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()]
            reached = [
                (x, g[start * n : stop * n])
                for x, g, n in zip(returned, gradients, of_outputs, strict=True)
                if x.requires_grad
            ]
            found = torch.autograd.grad(
                [x for x, _ in reached],
                list(copies.values()),
                [g for _, g in reached],
                allow_unused=True,
                materialize_grads=True,
            )
            per_unit.append(found)
    for parameter, found in zip(own.values(), zip(*per_unit, strict=True), strict=True):
        tape.at(parameter).add_held(torch.stack(found), AGAIN)


_lookups: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()
"""Of layers whether what they returned was rows of their table, each time that they were asked."""


def places_looked_up(tape: Tape, module: Any, given: Given, gradient: torch.Tensor) -> torch.Tensor | None:
    """Which rows of its table an embedding layer returned, int64 of the gradient's shape but for the last axis.

    A table whose every row is its own number is put in, as float64, which holds them exactly. None if what the layer
    returns then are no such numbers, or not the table's rows at these places: it does something else to them. That is
    found out in passes that are compared with plain autograd, and holds from then on.
    """
    if not _lookups.get(module, True):
        return None
    words, width = module.weight.shape
    numbers = torch.arange(words, dtype=torch.float64, device=module.weight.device)[:, None].expand(-1, width)
    with without_hooks(module), tape.pausing(), torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
        found = functional_call(module, {"weight": numbers}, given.args, given.named)
        places: torch.Tensor = found[..., 0].long()
        if tape.tried or module not in _lookups:  # else a GPU would have to be waited for in each pass
            right = found == places.unsqueeze(-1)
            rows = functional_call(module, {"weight": module.weight}, given.args, given.named)
            same = torch.equal(rows, module.weight[places.clamp(0, words - 1)])
            _lookups[module] = bool(right.all()) and same
            if not _lookups[module]:
                return None
    return places.expand(gradient.shape[:-1])


@contextmanager
def without_hooks(module: Any) -> Iterator[None]:
    """Within it the layer has no hooks of its own."""
    hooks, module._forward_hooks = module._forward_hooks, OrderedDict()
    before, module._forward_pre_hooks = module._forward_pre_hooks, OrderedDict()
    try:
        yield
    finally:
        module._forward_hooks, module._forward_pre_hooks = hooks, before
