"""Mixtures of experts: layers that hold one matrix an expert, and routers that say which token goes to which."""

from collections.abc import Callable, Mapping
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


CASTS = frozenset({"type", "to", "float", "type_as"})
"""Functions that leave a matrix in another dtype."""


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


Factors = tuple[torch.Tensor, torch.Tensor]
"""What a matrix is given and its product's gradient."""


def experts(tape: Tape, module: Any, given: Given, gradient: torch.Tensor) -> None:
    """y_t = Σ over chosen experts e of w_te · (h W_down[e] + b), h = act(x_t W_up[e] + b), for x_t in order."""
    parameters = dict(module.named_parameters())
    routing, factors = factors_of_experts(tape, module, parameters, given, gradient)
    back = torch.argsort(routing.order)
    for name, (x, g) in factors.items():
        tape.routed(parameters[name], routing, *((x, g) if module.is_transposed else (g, x)))
        bias = parameters.get(f"{name}_bias")
        if tape.wants(bias):
            assert bias is not None
            tape.at(bias).add_lookup(routing.expert[back], g[back], routing.segments)


def factors_of_experts(
    tape: Tape, module: Any, parameters: Mapping[str, torch.Tensor], given: Given, gradient: torch.Tensor
) -> tuple[Routing, dict[str, Factors]]:
    """What each matrix of experts is given and its products' gradients, of all vectors, expert by expert.

    Whatever way the layer computed its output, each vector's part in each of its experts is formed again.

    Args:
        parameters: The layer's, as its forward pass saw them.

    Returns:
        Which vectors these are; and [M, in] and [M, out] by matrix, whichever way it is stored.

    Raises:
        RowsMixedError: It is not given vectors, the experts of each, and their weights.
    """
    if len(given.args) != 3 or given.named or any(x.ndim != 2 for x in given.args):
        raise RowsMixedError("experts are given something other than vectors, their experts and weights")
    x, index, weights = given.args
    first = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = (parameters[name].detach() for name in (first, "down_proj"))
    dtype, chosen = down.dtype, index.shape[1]
    segments = tape.segments.times(len(x) // tape.rows * chosen)
    routing = Routing(index.reshape(-1)[: segments.total], len(down), segments)
    token = routing.order // chosen
    with torch.no_grad():
        vectors = x[token].to(dtype)
        out = gradient[token].to(dtype) * weights.reshape(-1, 1)[routing.order].to(dtype)
        inwards, outwards = (up, down) if module.is_transposed else (up.mT, down.mT)
        before = routing.products(vectors, inwards)
        if module.has_bias:
            before += parameters[f"{first}_bias"].detach()[routing.expert]
        hidden_gradient = routing.products(out, outwards.mT)
    with torch.enable_grad(), tape.pausing():
        before.requires_grad_()
        hidden = module._apply_gate(before) if module.has_gate else module.act_fn(before)
        (before_gradient,) = torch.autograd.grad(hidden, before, hidden_gradient)
    return routing, {first: (vectors, before_gradient), "down_proj": (hidden.detach(), out)}


def is_router(module: Any) -> bool:
    """Whether it is of a class that is named so, and holds one matrix and no more than a bias beside."""
    own = dict(module.named_parameters())
    named = any(kind in type(module).__name__ for kind in ("Router", "Gate"))
    return named and list(own) in (["weight"], ["weight", "bias"]) and own["weight"].ndim == 2


def router(tape: Tape, module: Any, given: Given, gradient: Any) -> None:
    """A layer that multiplies vectors by its matrix, as `linear` does, and goes on with the products by itself.

    One that uses its matrix otherwise is run again for each unit.
    """
    found = products_of_router(tape, module, dict(module.named_parameters()), given, gradient)
    if found is None:
        generic(tape, module, given, gradient)
        return
    for x, g in found:
        left = tape.by_row(g)
        tape.outer(module.weight, left, tape.by_row(x).to(left.dtype))
        tape.summed(getattr(module, "bias", None), left)


def products_of_router(
    tape: Tape, module: Any, parameters: Mapping[str, torch.Tensor], given: Given, gradient: Any
) -> list[Factors] | None:
    """What a router's matrix is given, and its products' gradients, call by call; None if it is not used so alone.

    The layer is run again, once for all rows, with something added to the products that is zero and of which the
    gradient is asked.

    Args:
        parameters: The layer's, as its forward pass saw them.
    """
    copies = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
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
    asked = [*seen.probes, *copies.values()]
    found = torch.autograd.grad([x for x, _ in reached], asked, [g for _, g in reached], allow_unused=True)
    products = len(seen.probes)
    if not products or seen.unknown or any(g is not None for g in found[products:]):
        return None
    return [(x, g) for x, g in zip(seen.vectors, found[:products], strict=True) if g is not None]


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
        self._order = order
        # Each as it is, and in other dtypes.
        self._matrices, self._biases = [copies["weight"]], [copies.get("bias")]
        self.vectors: list[torch.Tensor] = []
        self.probes: list[torch.Tensor] = []
        self.unknown = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for known in (self._matrices, self._biases):
            if getattr(func, "__name__", "") in CASTS and any(args[0] is one for one in known):
                known.append(result)
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {}) if func is linear else {}
        if not any(named.get("weight") is one for one in self._matrices):
            return result
        if not any(named.get("bias") is one for one in self._biases):
            return result
        x, weight, bias = named["input"], named["weight"], named.get("bias")
        self.unknown |= x.ndim == 2 and self._order is not None and not self._order.known(x)
        product = linear(x, weight.detach(), None if bias is None else bias.detach())
        self.vectors.append(x.detach())
        self.probes.append(torch.zeros_like(product).requires_grad_())
        return product + self.probes[-1]
