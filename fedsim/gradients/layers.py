"""A table of layers: from a layer's inputs and output gradients to terms of its parameters' gradients."""

from collections.abc import Callable
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.func import functional_call

from fedsim.gradients.rules.adapters import (
    adapted_experts,
    adapted_router,
    is_adapted_experts,
    is_adapted_router,
    own_parameters,
    within_wrappers,
)
from fedsim.gradients.rules.again import generic, places_looked_up
from fedsim.gradients.rules.experts import experts, is_experts, is_router, router
from fedsim.gradients.tape import Given, Record, Tape

RULES: list[tuple[str, Callable[[Any], bool], Record]] = []
"""For each kind of layer its name, which modules are of it, and its rule; the first that fits is used."""


def rule_for(module: torch.nn.Module) -> tuple[str, Record]:
    """A name for the layer's kind and its rule; any layer that no kind fits is recomputed unit by unit."""
    for kind, fits, rule in RULES:
        if fits(module):
            return kind, rule
    return f"generic ({type(module).__name__})", generic


def trained_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Every module with trainable parameters of its own, with its name."""
    inner = within_wrappers(model)
    return [
        (name, module)
        for name, module in model.named_modules()
        if module not in inner and any(parameter.requires_grad for parameter in own_parameters(module))
    ]


def layer_kinds(model: torch.nn.Module, head: torch.nn.Module | None) -> dict[str, str]:
    """The kind of rule of each layer with trainable parameters, by the layer's name; `head` is fused with the loss."""
    return {
        name: "fused with the loss" if module is head else rule_for(module)[0]
        for name, module in trained_layers(model)
    }


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


_by_trying: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()
"""Whether a layer with a forward pass of its own was seen to do what its class's does."""


def _is_linear(module: Any) -> bool:
    """One whose forward pass is the class's own, or was found to compute the same, once."""
    if type(module).forward is torch.nn.Linear.forward:
        return True
    if not isinstance(module, torch.nn.Linear) or not set(dict(module.named_parameters())) <= {"weight", "bias"}:
        return False
    if module not in _by_trying:
        _by_trying[module] = _multiplies(module)
    return _by_trying[module]


@torch.no_grad()
def _multiplies(module: torch.nn.Linear) -> bool:
    """Whether random vectors come out as those of a linear layer do, bit by bit or nearly so."""
    line = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0)).to(module.weight)
    try:
        found = module(line[None])
        expected = torch.nn.functional.linear(line[None], module.weight, module.bias)
    except Exception:  # what else it may be is not known: it is no such layer
        return False
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return False
    off, size = (float(x.double().norm()) for x in (found - expected, expected))
    return bool(off <= 8 * torch.finfo(line.dtype).eps * module.in_features**0.5 * size)


def _is_scaled_embedding(module: Any) -> bool:
    """A table whose rows are looked up and multiplied by something, found out by trying, once."""
    if not _is_table(module) or [name for name, _ in module.named_parameters()] != ["weight"]:
        return False
    if module not in _by_trying:
        _by_trying[module] = _scales(module)
    return _by_trying[module]


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


def _is_named_norm(module: Any) -> bool:
    """Any of the many classes of such a name in model libraries, with a weight of features or of heads' features."""
    if not any(kind in type(module).__name__ for kind in ("RMSNorm", "LayerNorm")):
        return False
    parameters = dict(module.named_parameters())
    return list(parameters) in (["weight"], ["weight", "bias"]) and parameters["weight"].ndim in (1, 2)


def _is_norm_of_features(module: Any) -> bool:
    return _is_named_norm(module) and module.weight.ndim == 1


@layer("linear", _is_linear)
def linear(tape: Tape, module: Any, given: Given, gradient: torch.Tensor) -> None:
    """y = x W^T + b. Weight [out, in]: gradient^T x. Bias [out]: the sum of gradient."""
    gradient = tape.by_row(gradient)
    tape.outer(module.weight, gradient, tape.by_row(given.tensor).to(gradient.dtype))
    tape.summed(module.bias, gradient)


@layer("linear", _is_conv1d)
def conv1d(tape: Tape, module: Any, given: Given, gradient: torch.Tensor) -> None:
    """y = x W + b. Weight [in, out]: x^T gradient. Bias [out]: the sum of gradient."""
    gradient = tape.by_row(gradient)
    tape.outer(module.weight, tape.by_row(given.tensor).to(gradient.dtype), gradient)
    tape.summed(module.bias, gradient)


@layer("embedding", _is_embedding)
def embedding(tape: Tape, module: Any, given: Given, gradient: torch.Tensor) -> None:
    """Rows of a table by index. The output gradient goes to the row that was looked up; none to the padding index."""
    index = given.tensor.expand(gradient.shape[:-1])
    if module.padding_idx is not None:
        gradient = gradient.masked_fill((index == module.padding_idx).unsqueeze(-1), 0)
    tape.lookup(module.weight, tape.by_row(index.unsqueeze(-1))[..., 0], tape.by_row(gradient))


@layer("embedding", _is_scaled_embedding)
def scaled_embedding(tape: Tape, module: Any, given: Given, gradient: torch.Tensor) -> None:
    """The same with each value multiplied by a constant, and so its gradient."""
    embedding(tape, module, given, gradient * _times(module, given.tensor))


@layer("normalisation", _is_layer_norm)
def layer_norm(tape: Tape, module: Any, given: Given, gradient: torch.Tensor) -> None:
    """y = w · x̂ + b. Weight: the sum of gradient · x̂. Bias: the sum of gradient."""
    tape.summed(module.weight, tape.by_row(gradient * normal_of(module, given, gradient.dtype)))
    tape.summed(module.bias, tape.by_row(gradient))


@layer("normalisation of heads", _is_named_norm)
@layer("normalisation", _is_norm_of_features)  # which is asked first
def named_norm(tape: Tape, module: Any, given: Given, gradient: torch.Tensor) -> None:
    """y = w · x̂ + b, or (1 + w) · x̂ + b. Weight: the sum of gradient · x̂. Bias: the sum of gradient."""
    normal = normal_of(module, given, gradient.dtype)
    tape.summed(module.weight, tape.by_row(gradient * normal, module.weight.ndim))
    tape.summed(getattr(module, "bias", None), tape.by_row(gradient, module.weight.ndim))


def normal_of(module: Any, given: Given, dtype: torch.dtype) -> torch.Tensor:
    """What a normalisation of either kind multiplies by its weight: x̂, of its output's shape.

    The output of the many classes named so is affine in the weight, so x̂ is its difference between weights of 1 and 0.
    Asking the module keeps its own rounding and its own convention: some multiply by w, some by 1 + w, some by a gate
    that they are given, too.
    """
    if _is_layer_norm(module):
        return torch.nn.functional.layer_norm(given.tensor.to(dtype), module.normalized_shape, eps=module.eps)
    plain = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
    ones = plain | {"weight": torch.ones_like(module.weight)}
    one: torch.Tensor = functional_call(module, ones, given.args, given.named)
    zero: torch.Tensor = functional_call(module, plain, given.args, given.named)
    return one - zero


def _is_table_of_positions(module: Any) -> bool:
    """One that is asked for more than the rows at an index."""
    if not _is_table(module) or len(signature(type(module).forward).parameters) <= 2:
        return False
    return [name for name, _ in module.named_parameters()] == ["weight"]


@layer("positions", _is_table_of_positions)
def positions(tape: Tape, module: Any, given: Given, gradient: torch.Tensor) -> None:
    """Rows of a table at places that the layer works out by itself: it is asked which they are."""
    found = places_looked_up(tape, module, given, gradient)
    if found is None:
        generic(tape, module, given, gradient)
        return
    tape.lookup(module.weight, tape.by_row(found.unsqueeze(-1))[..., 0], tape.by_row(gradient))


layer("experts", is_experts)(experts)
layer("router", is_router)(router)
layer("adapters of experts", is_adapted_experts)(adapted_experts)
layer("adapters of a router", is_adapted_router)(adapted_router)
