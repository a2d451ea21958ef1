"""Adapters on a bare parameter, as PEFT puts them on experts and routers: their matrices are used, never called."""

from functools import partial
from typing import Any

import torch

from fedsim.gradients.rules.experts import Factors, factors_of_experts, is_experts, is_router, products_of_router
from fedsim.gradients.tape import Given, RowsMixedError, Tape


def is_adapted_experts(module: Any) -> bool:
    """Whether it is a chain of PEFT's wrappers around a frozen layer of experts, each with one adapter in use."""
    return _is_adapted(module) and is_experts(module.get_base_layer())


def is_adapted_router(module: Any) -> bool:
    """The same around a router."""
    return _is_adapted(module) and is_router(module.get_base_layer())


def own_parameters(module: Any) -> list[torch.nn.Parameter]:
    """A layer's own parameters; of a chain of wrappers the adapters' matrices."""
    if not is_adapted_experts(module) and not is_adapted_router(module):
        return [parameter for parameter in module._parameters.values() if parameter is not None]
    return [matrix for wrapper in _chain(module) for matrix in _matrices(wrapper)]


def within_wrappers(model: torch.nn.Module) -> set[torch.nn.Module]:
    """Modules whose parameters are a wrapper's own around them."""
    inner: set[torch.nn.Module] = set()
    for module in model.modules():
        if module not in inner and (is_adapted_experts(module) or is_adapted_router(module)):
            inner.update(found for found in module.modules() if found is not module)
    return inner


def _is_adapted(module: Any) -> bool:
    if type(module).__name__ != "ParamWrapper":
        return False
    frozen = not any(p.requires_grad for p in module.get_base_layer().parameters())
    return frozen and all(
        not wrapper.merged and not wrapper.disable_adapters and len(set(wrapper.active_adapters)) == 1
        for wrapper in _chain(module)
    )


def _chain(module: Any) -> list[Any]:
    """The wrappers, the outermost first."""
    found = []
    while type(module).__name__ == "ParamWrapper":
        found.append(module)
        module = module.base_layer
    return found


def _matrices(wrapper: Any) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """A, [r · experts, in], and B, [out, r · experts]."""
    (name,) = set(wrapper.active_adapters)
    return wrapper.lora_A[name].weight, wrapper.lora_B[name].weight


def _scaling(wrapper: Any) -> float:
    (name,) = set(wrapper.active_adapters)
    return float(wrapper.scaling[name])


def _adapted(module: Any) -> dict[str, torch.Tensor]:
    """The base layer's parameters as its forward pass sees them."""
    found = {name: parameter.detach() for name, parameter in module.get_base_layer().named_parameters()}
    with torch.no_grad():
        for wrapper in _chain(module):
            (name,) = set(wrapper.active_adapters)
            found[wrapper.parameter_name] = found[wrapper.parameter_name] + wrapper.get_delta_weight(name)
    return found


def adapted_experts(tape: Tape, module: Any, given: Given, gradient: torch.Tensor) -> None:
    """W_e + s · B_e A_e, or turned, for each expert e: a vector x and its output's gradient g leave s · B_e^T g x^T
    for A_e and s · g (A_e x)^T for B_e."""
    routing, factors = factors_of_experts(tape, module.get_base_layer(), _adapted(module), given, gradient)
    for wrapper in _chain(module):
        a, b = _matrices(wrapper)
        x, g = _wide(factors[wrapper.parameter_name], a.dtype, _scaling(wrapper))
        experts = wrapper.num_experts
        stacked_a, stacked_b = partial(_stacked_a, experts), partial(_stacked_b, experts)
        of_a, of_b = stacked_a(a.detach()), stacked_b(b.detach())
        tape.routed(a, routing, routing.products(g, of_b), x, stacked_a)
        tape.routed(b, routing, g, routing.products(x, of_a.mT), stacked_b)


def _stacked_a(experts: int, a: torch.Tensor) -> torch.Tensor:
    """[r · experts, in] as [experts, r, in]."""
    return a.view(experts, -1, a.shape[1])


def _stacked_b(experts: int, b: torch.Tensor) -> torch.Tensor:
    """[out, r · experts] as [experts, out, r]: of B the experts are the inner axis."""
    return b.view(len(b), -1, experts).permute(2, 0, 1)


def adapted_router(tape: Tape, module: Any, given: Given, gradient: Any) -> None:
    """The same of one matrix."""
    found = products_of_router(tape, module.get_base_layer(), _adapted(module), given, gradient)
    if found is None:
        raise RowsMixedError("a router with adapters uses its matrix in a way that is not known")
    for factors in found:
        for wrapper in _chain(module):
            a, b = _matrices(wrapper)
            x, g = _wide(factors, a.dtype, _scaling(wrapper))
            tape.outer(a, tape.by_row(g @ b.detach()), tape.by_row(x))
            tape.outer(b, tape.by_row(g), tape.by_row(x @ a.detach().mT))


def _wide(factors: Factors, dtype: torch.dtype, scaling: float) -> Factors:
    x, g = factors
    return x.to(dtype), g.to(dtype) * scaling
