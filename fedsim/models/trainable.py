"""Which weights are trained where there are no adapters: all, or those that were named."""

import re
from collections.abc import Iterable

import torch

from fedsim.errors import InvalidInput
from fedsim.models.config import ALL, is_expression

EXAMPLES = 20
"""Names that a refusal offers at most."""


def freeze_others(model: torch.nn.Module, named: tuple[str, ...], drawn: Iterable[str] = ()) -> None:
    """Let the named weights of a model be trained, and what was drawn at random; freeze all others.

    Args:
        model: Its parameters' `requires_grad` are set, in place.
        named: Dotted parts of a parameter's name that are next to each other ("bias", "layers.3", "lm_head.weight"),
            or regular expressions that fit its whole name. A parameter that two modules share has two names. Empty, or
            "all", names every parameter.
        drawn: Names of parameters that no file had, a new classifier's head: frozen at random they would be of no use.

    Raises:
        InvalidInput: Some of the names are nobody's.
    """
    if not named or named == (ALL,):
        model.requires_grad_(True)
        return
    parameters = list(model.named_parameters(remove_duplicate=False))
    model.requires_grad_(False)
    for one in named:
        fitting = [parameter for name, parameter in parameters if _fits(one, name)]
        if not fitting:
            raise InvalidInput("model.trainable", one, f"in the name of a parameter: {_offered(parameters)}")
        for parameter in fitting:
            parameter.requires_grad_(True)
    new = set(drawn)
    for name, parameter in parameters:
        if name in new:
            parameter.requires_grad_(True)


def _fits(given: str, name: str) -> bool:
    if is_expression(given):
        return re.fullmatch(given, name) is not None
    return f".{given}." in f".{name}."


def _offered(parameters: list[tuple[str, torch.nn.Parameter]]) -> str:
    parts = {part for name, _ in parameters for part in name.split(".") if not part.isdigit()}
    few = sorted(parts)[:EXAMPLES]
    return ", ".join(few) + (", …" if len(parts) > len(few) else "")
