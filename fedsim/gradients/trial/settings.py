"""What of a model decides what it computes, besides its parameters' values: a trial holds for as long as it is so."""

from collections import OrderedDict
from typing import Any

import torch

TOLD_APART = ("_parameters", "_buffers", "_modules")
"""Of a module's collections, those whose members are looked at by themselves."""
PLAIN = frozenset({bool, int, float, str, type(None), torch.dtype})
COLLECTIONS = frozenset({list, tuple, set, dict, OrderedDict})


def settings_of(model: torch.nn.Module) -> tuple[object, ...]:
    """Which tensors and modules a model has, their settings and those of its configuration, to be compared."""
    tensors = (*model.parameters(), *model.buffers())
    held = tuple((id(t), t.dtype, t.device, t.requires_grad) for t in tensors)
    config = getattr(model, "config", None)
    modules = tuple(_settings(module) for module in model.modules())
    return held, modules, () if config is None else _settings(config)


def _settings(of: Any) -> tuple[object, ...]:
    """Numbers, words and switches among an object's attributes, and how many hooks it has."""
    found: list[object] = [type(of)]
    for name, value in vars(of).items():
        if type(value) in PLAIN:
            found.append((name, value))
        elif value.__class__ in COLLECTIONS and value and name not in TOLD_APART:
            found.append((name, len(value), str(value) if all(map(_plain, _members(value))) else ""))
    return tuple(found)


def _members(value: Any) -> list[Any]:
    return [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)


def _plain(value: Any) -> bool:
    return type(value) in PLAIN
