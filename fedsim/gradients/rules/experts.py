"""Mixtures of experts: layers that hold one matrix an expert, and routers that say which token goes to which."""

from collections.abc import Callable
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fedsim.gradients.per_unit.routed import Routing
from fedsim.gradients.rows.order import RowOrder
from fedsim.gradients.rules.again import generic, without_hooks
from fedsim.gradients.tape import Given, RowsMixedError, Tape

MATRICES = {"gate_up_proj", "up_proj", "down_proj"}
BIASES = {"gate_up_proj_bias", "up_proj_bias", "down_proj_bias"}
SETTINGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel")
"""What transformers notes of a layer of experts by which any of its implementations computes it."""


def is_experts(module: Any) -> bool:
    """Whether it is a layer of transformers that holds its experts' matrices stacked, all of it on this device."""
    if not all(isinstance(getattr(module, name, None), bool) for name in SETTINGS):
        return False
    own = dict(module.named_parameters())
    plain = not module.has_post_expert_norm and not module._is_expert_parallel
    first = "gate_up_proj" if module.has_gate else "up_proj"
    return (
        plain
        and set(own) == {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if module.has_bias else set())
        and all(own[name].ndim == 3 for name in (first, "down_proj"))
    )


def experts(tape: Tape, module: Any, given: Given, gradient: torch.Tensor) -> None:
    """y_t = Σ over chosen experts e of w_te · (h W_down[e] + b), h = act(x_t W_up[e] + b), for vectors x_t in order.

    Whatever way the layer computed that, each vector's part in each of its experts is formed again, all experts'
    vectors one after the other.

    Raises:
        RowsMixedError: It is not given vectors, the experts of each, and their weights.
    """
    if len(given.args) != 3 or given.named or any(x.ndim != 2 for x in given.args):
        raise RowsMixedError("experts are given something other than vectors, their experts and weights")
    x, index, weights = given.args
    first = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, first), module.down_proj
    dtype, chosen = down.dtype, index.shape[1]
    segments = tape.segments.times(len(x) // tape.rows * chosen)
    expert = index.reshape(-1)[: segments.total]
    routing = Routing(expert, len(down), segments)
    token = routing.order // chosen
    with torch.no_grad():
        vectors = x[token].to(dtype)
        out = gradient[token].to(dtype) * weights.reshape(-1, 1)[routing.order].to(dtype)
        inwards, outwards = (m.detach() if module.is_transposed else m.detach().mT for m in (up, down))
        before = routing.products(vectors, inwards)
        if module.has_bias:
            before += getattr(module, f"{first}_bias").detach()[expert[routing.order]]
        hidden_gradient = routing.products(out, outwards.mT)
    with torch.enable_grad(), tape.pausing():
        before.requires_grad_()
        hidden = module._apply_gate(before) if module.has_gate else module.act_fn(before)
        (before_gradient,) = torch.autograd.grad(hidden, before, hidden_gradient)
    hidden = hidden.detach()
    for parameter, given_in, left_out in ((up, vectors, before_gradient), (down, hidden, out)):
        factors = (given_in, left_out) if module.is_transposed else (left_out, given_in)
        tape.routed(parameter, routing, *factors)
    if module.has_bias:
        back = torch.argsort(routing.order)
        for name, left_out in ((first, before_gradient), ("down_proj", out)):
            bias = getattr(module, f"{name}_bias")
            if tape.wants(bias):
                tape.at(bias).add_lookup(expert, left_out[back], segments)


def is_router(module: Any) -> bool:
    """Whether it is of a class that is named so, and holds one matrix and no more than a bias beside."""
    own = dict(module.named_parameters())
    named = any(kind in type(module).__name__ for kind in ("Router", "Gate"))
    return named and list(own) in (["weight"], ["weight", "bias"]) and own["weight"].ndim == 2


def router(tape: Tape, module: Any, given: Given, gradient: Any) -> None:
    """A layer that multiplies vectors by its matrix, as `linear` does, and goes on with the products by itself.

    It is run again, once for all rows, with something added to the products that is zero and of which the gradient
    is asked. A layer that uses its matrix otherwise is run again for each unit.
    """
    copies = {name: p.detach().requires_grad_(tape.wants(p)) for name, p in module.named_parameters()}
    order = RowOrder(tape.rows, tape.packed)
    for thing in tree_leaves((given.args, given.named)):
        if tape.order is not None and isinstance(thing, torch.Tensor) and tape.order.known(thing):
            order.mark(thing)
    seen = _Products(copies, order if tape.together else None)
    with without_hooks(module), tape.pausing(), torch.enable_grad(), order, seen:
        output = functional_call(module, copies, given.args, given.named)
    gradients = gradient if isinstance(gradient, tuple) else (gradient,)
    floats = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    reached = [(x, g) for x, g in zip(floats, gradients, strict=True) if x.requires_grad]
    asked = [*seen.probes, *(copy for copy in copies.values() if copy.requires_grad)]
    found = torch.autograd.grad([x for x, _ in reached], asked, [g for _, g in reached], allow_unused=True)
    products = len(seen.probes)
    if not products or seen.unknown or any(g is not None for g in found[products:]):
        generic(tape, module, given, gradient)
        return
    for x, product_gradient in zip(seen.vectors, found[:products], strict=True):
        if product_gradient is not None:
            left = tape.by_row(product_gradient)
            tape.outer(module.weight, left, tape.by_row(x).to(left.dtype))
            tape.summed(getattr(module, "bias", None), left)


class _Products(TorchFunctionMode):
    """Within it products with a layer's matrix have a zero added to them.

    Args:
        copies: The layer's parameters.
        order: Says whether vectors are in the rows' order; None where there is one unit.

    Attributes:
        vectors: What was multiplied by the matrix, call by call.
        probes: The zeros.
        unknown: Whether vectors were multiplied that may be in another order.
    """

    def __init__(self, copies: dict[str, torch.Tensor], order: RowOrder | None) -> None:
        super().__init__()
        self._copies, self._order = copies, order
        self.vectors: list[torch.Tensor] = []
        self.probes: list[torch.Tensor] = []
        self.unknown = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {}) if func is linear else {}
        bias = named.get("bias")
        if named.get("weight") is not self._copies["weight"] or bias is not self._copies.get("bias"):
            return func(*args, **(kwargs or {}))
        x = named["input"]
        self.unknown |= x.ndim == 2 and self._order is not None and not self._order.known(x)
        product = linear(x, self._copies["weight"].detach(), None if bias is None else bias.detach())
        self.vectors.append(x.detach())
        self.probes.append(torch.zeros_like(product).requires_grad_())
        return product + self.probes[-1]
