"""What of a model decides what it computes, besides its parameters' values: a trial holds for as long as it is so."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

TOLD_APART = ("_parameters", "_buffers", "_modules")
"""Of a module's collections, those whose members are looked at by themselves."""
PLAIN = frozenset({bool, int, float, str, type(None), torch.dtype})
COLLECTIONS = frozenset({list, tuple, set, dict, OrderedDict})


def settings_of(model: torch.nn.Module) -> tuple[object, ...]:
    """Which tensors and modules a model has, what buffers hold, and the settings of modules and configurations.

    To be compared with what it was. Settings are numbers and words, alone or in collections, functions and hooks. What
    is behind other objects that hang on a module is not seen.
    """
    parameters = tuple((id(p), p.dtype, p.device, p.requires_grad) for p in model.parameters())
    buffers = tuple((id(b), b.dtype, b.device, _version(b)) for b in model.buffers())
    modules, configs = [], {}
    for module in model.modules():
        modules.append(_settings(module))
        config = vars(module).get("config")
        if hasattr(config, "__dict__"):
            configs[id(config)] = config
    return parameters, buffers, tuple(modules), tuple(map(_config_settings, configs.values()))


def _version(buffer: torch.Tensor) -> int:
    """How often it was written to, as far as that is counted."""
    return 0 if buffer.is_inference() else buffer._version


def _config_settings(config: Any) -> tuple[object, ...]:
    """Those of a configuration and of others within it."""
    within = (value for value in vars(config).values() if type(value).__name__.endswith("Config"))
    return (_settings(config), *map(_config_settings, within))


def _settings(of: Any) -> tuple[object, ...]:
    """Numbers, words, switches and functions among an object's attributes, and which hooks it has."""
    found: list[object] = [type(of)]
    for name, value in vars(of).items():
        kind = type(value)
        if kind in PLAIN:
            found.append((name, value))
        elif kind in COLLECTIONS:
            if value and name not in TOLD_APART:
                found.append((name, len(value), tuple(map(_told, _members(value)))))
        elif isinstance(value, Callable) and not isinstance(value, torch.nn.Module):  # type: ignore[arg-type]
            found.append((name, id(value)))
    return tuple(found)


def _members(value: Any) -> list[Any]:
    return [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)


def _told(member: Any) -> object:
    """A member of a collection, or what it is where it cannot be compared."""
    return member if type(member) in PLAIN else type(member)
