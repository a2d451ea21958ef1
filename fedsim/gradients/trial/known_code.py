"""Whether a model is of code that many use: what a trial cannot show of any code is then known not to be there."""

from collections.abc import Callable
from typing import Any

import torch

LIBRARIES = frozenset({"torch", "transformers", "peft", "bitsandbytes"})
"""Whose modules mix tokens, if at all, in ways that a trial shows: by attention, convolutions or states."""


def is_known_code(model: torch.nn.Module) -> bool:
    """Whether every module is of a class of LIBRARIES, with that class's own forward pass and no hooks of others.

    A module of anybody's own may let a row see its neighbours only where they say a certain word, or count the
    tokens of a pass, whatever it was seen to do in a trial.
    """
    return all(_of_a_library(type(module)) and _as_it_came(module) for module in model.modules())


def _of_a_library(code: type | Callable[..., Any]) -> bool:
    return (getattr(code, "__module__", None) or "").partition(".")[0] in LIBRARIES


def _as_it_came(module: torch.nn.Module) -> bool:
    hooks = (
        hook
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        for hook in vars(module)[kind].values()
    )
    return "forward" not in vars(module) and all(map(_of_a_library, hooks))
