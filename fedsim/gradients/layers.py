"""A table of layers: from a layer's inputs and output gradients to terms of its parameters' gradients."""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.func import functional_call

from fedsim.gradients.tape import Record, RowsMixedError, Tape

RULES: list[tuple[str, Callable[[Any], bool], Record]] = []
"""For each kind of layer its name, which modules are of it, and its rule; the first that fits is used."""


def rule_for(module: torch.nn.Module) -> tuple[str, Record]:
    """A name for the layer's kind and its rule; any layer that no kind fits is recomputed unit by unit."""
    for kind, fits, rule in RULES:
        if fits(module):
            return kind, rule
    return f"generic ({type(module).__name__})", generic


def layer(kind: str, fits: Callable[[Any], bool]) -> Callable[[Record], Record]:
    """Enter the decorated rule in the table, for modules that fit."""

    def enter(rule: Record) -> Record:
        RULES.append((kind, fits, rule))
        return rule

    return enter


def _is_conv1d(module: Any) -> bool:
    """Hugging Face's, which the engine must know without importing it."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and weight is not None and weight.ndim == 2


def _is_table(module: Any) -> bool:
    """Of rows whose gradients are what autograd says they are."""
    table = isinstance(module, torch.nn.Embedding)
    return table and module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


def _is_embedding(module: Any) -> bool:
    return _is_table(module) and type(module).forward is torch.nn.Embedding.forward


_scaled_embeddings: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def _is_scaled_embedding(module: Any) -> bool:
    """A table whose rows are looked up and multiplied by something, found out by trying, once."""
    if not _is_table(module) or [name for name, _ in module.named_parameters()] != ["weight"]:
        return False
    if module not in _scaled_embeddings:
        _scaled_embeddings[module] = _scales(module)
    return _scaled_embeddings[module]


@torch.no_grad()
def _scales(module: torch.nn.Embedding) -> bool:
    """Whether rows of random values come out as `_times` says.

    The table that is put in is a window that moves along a line of values: no two of its rows are alike, and they take
    the memory of one column, where a table of a large vocabulary would take gigabytes.
    """
    words, width = module.weight.shape
    line = torch.randn(words + width - 1, generator=torch.Generator().manual_seed(0)).to(module.weight)
    table = line.unfold(0, width, 1)
    index = torch.arange(0, words, max(1, words // 256), device=line.device).view(1, -1)
    try:
        found = functional_call(module, {"weight": table}, index)
        expected = table[index] * _times(module, index)
    except Exception:  # what else it may be is not known: it is no such layer
        return False
    off = float((found - expected).double().norm())
    return found.shape == expected.shape and off <= 4 * torch.finfo(line.dtype).eps * float(found.double().norm())


def _times(module: torch.nn.Embedding, index: torch.Tensor) -> torch.Tensor:
    """What each value that is looked up is multiplied by: what a table of ones gives.

    Asking the module keeps its own rounding.
    """
    ones = torch.ones((), dtype=module.weight.dtype, device=module.weight.device)
    scale: torch.Tensor = functional_call(module, {"weight": ones.expand_as(module.weight)}, index)
    return scale


def _is_layer_norm(module: Any) -> bool:
    return type(module).forward is torch.nn.LayerNorm.forward and len(module.normalized_shape) == 1


def _is_rms_norm(module: Any) -> bool:
    """Any of the many classes of that name in model libraries."""
    if "RMSNorm" not in type(module).__name__:
        return False
    parameters = dict(module.named_parameters())
    return list(parameters) == ["weight"] and parameters["weight"].ndim == 1


@layer("linear", lambda module: type(module).forward is torch.nn.Linear.forward)
def linear(tape: Tape, module: Any, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> None:
    """y = x W^T + b. Weight [out, in]: gradient^T x. Bias [out]: the sum of gradient."""
    gradient = tape.by_row(gradient)
    tape.outer(module.weight, gradient, tape.by_row(inputs[0]).to(gradient.dtype))
    tape.summed(module.bias, gradient)


@layer("linear", _is_conv1d)
def conv1d(tape: Tape, module: Any, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> None:
    """y = x W + b. Weight [in, out]: x^T gradient. Bias [out]: the sum of gradient."""
    gradient = tape.by_row(gradient)
    tape.outer(module.weight, tape.by_row(inputs[0]).to(gradient.dtype), gradient)
    tape.summed(module.bias, gradient)


@layer("embedding", _is_embedding)
def embedding(tape: Tape, module: Any, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> None:
    """Rows of a table by index. The output gradient goes to the row that was looked up; none to the padding index."""
    index = inputs[0].expand(gradient.shape[:-1])
    if module.padding_idx is not None:
        gradient = gradient.masked_fill((index == module.padding_idx).unsqueeze(-1), 0)
    tape.lookup(module.weight, tape.by_row(index.unsqueeze(-1))[..., 0], tape.by_row(gradient))


@layer("embedding", _is_scaled_embedding)
def scaled_embedding(tape: Tape, module: Any, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> None:
    """The same with each value multiplied by a constant, and so its gradient."""
    embedding(tape, module, inputs, gradient * _times(module, inputs[0]))


@layer("normalisation", _is_layer_norm)
def layer_norm(tape: Tape, module: Any, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> None:
    """y = w · x̂ + b. Weight: the sum of gradient · x̂. Bias: the sum of gradient."""
    tape.summed(module.weight, tape.by_row(gradient * normal_of(module, inputs[0], gradient.dtype)))
    tape.summed(module.bias, tape.by_row(gradient))


@layer("normalisation", _is_rms_norm)
def rms_norm(tape: Tape, module: Any, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> None:
    """y = w · x̂, or (1 + w) · x̂. Weight: the sum of gradient · x̂."""
    tape.summed(module.weight, tape.by_row(gradient * normal_of(module, inputs[0], gradient.dtype)))


def normal_of(module: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a normalisation of either kind multiplies by its weight: x̂, of x's shape.

    The output of the many classes named RMSNorm is affine in the weight, so x̂ is its difference between weights of 1
    and 0. Asking the module keeps its own rounding and its own convention: some multiply by w, some by 1 + w.
    """
    if _is_layer_norm(module):
        return torch.nn.functional.layer_norm(x.to(dtype), module.normalized_shape, eps=module.eps)
    one: torch.Tensor = functional_call(module, {"weight": torch.ones_like(module.weight)}, (x,))
    zero: torch.Tensor = functional_call(module, {"weight": torch.zeros_like(module.weight)}, (x,))
    return one - zero


def generic(tape: Tape, module: Any, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> None:
    """Any layer whose inputs and output have the rows first: run again for each unit's rows, with plain autograd.

    Each unit's gradients of the layer's own parameters are formed and held.
    """
    own = {name: p for name, p in module.named_parameters(recurse=False) if tape.wants(p)}
    copies = {name: p.detach().requires_grad_() for name, p in own.items()}
    if tape.packed or len(gradient) != tape.rows:
        raise RowsMixedError(f"{type(module).__name__} returns {len(gradient)} rows for {tape.rows}")
    per_unit: list[tuple[torch.Tensor, ...]] = []
    hooks, module._forward_hooks = module._forward_hooks, OrderedDict()
    before, module._forward_pre_hooks = module._forward_pre_hooks, OrderedDict()
    try:
        for start, stop in pairwise(tape.segments.offsets.tolist()):
            with torch.enable_grad():
                given = tuple(x[start:stop] if len(x) == tape.rows else x for x in inputs)
                output = functional_call(module, copies, given)
            found = torch.autograd.grad(
                output, list(copies.values()), gradient[start:stop], allow_unused=True, materialize_grads=True
            )
            per_unit.append(found)
    finally:
        module._forward_hooks, module._forward_pre_hooks = hooks, before
    for parameter, gradients in zip(own.values(), zip(*per_unit, strict=True), strict=True):
        tape.at(parameter).add_held(torch.stack(gradients), "held, recomputed unit by unit")
