"""What of a model decides what it computes, besides its parameters' values: a trial holds for as long as it is so."""

from collections import OrderedDict
from typing import Any
from weakref import ref

import torch

TOLD_APART = frozenset({"_parameters", "_buffers", "_modules"})
"""Of a module's collections, those whose members are looked at by themselves."""
PLAIN = frozenset({bool, int, float, str, type(None), torch.dtype})
COLLECTIONS = frozenset({list, tuple, set, dict, OrderedDict})


def settings_of(model: torch.nn.Module) -> tuple[object, ...]:
    """Which tensors and modules a model has, what buffers hold, and the settings of modules and configurations.

    To be compared with what it was. Settings are numbers and words, alone or in collections, functions and hooks. What
    is behind other objects that hang on a module is not seen.
    """
    # Of thousands of modules each has a dozen collections that are empty. So there is one walk, which notes everything
    # end to end: tuples of each, and walks for parameters and buffers, would take longer than all the rest.
    noted: list[object] = []
    modules, numbers = [model], {id(model): 0}
    configs: dict[int, Any] = {}
    for module in modules:  # which grows on the way
        _note(module, noted)
        if module._parameters:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    noted += (name, *_itself(parameter), parameter.dtype, parameter.device, parameter.requires_grad)
        if module._buffers:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    noted += (name, *_itself(buffer), buffer.dtype, buffer.device, _version(buffer))
        if module._modules:
            for name, child in module._modules.items():
                if child is not None:
                    number = numbers.setdefault(id(child), len(modules))
                    if number == len(modules):
                        modules.append(child)
                    noted += (name, number)  # whose child it is, of which there may be several
        config = vars(module).get("config")
        if config is not None and hasattr(config, "__dict__"):
            configs[id(config)] = config
    for config in configs.values():
        _note_config(config, noted)
    return tuple(noted)


def _itself(of: Any) -> tuple[object, ...]:
    """Equal to that of the same object alone: when one is gone, another may have its number."""
    try:
        same = ref(of)
        hash(same)  # which it keeps when the object is gone
    except TypeError:  # an object that cannot be referred to so
        return (id(of),)
    return id(of), same


def _version(buffer: torch.Tensor) -> int:
    """How often it was written to, as far as that is counted."""
    return 0 if buffer.is_inference() else buffer._version


def _note_config(config: Any, noted: list[object]) -> None:
    """Settings of a configuration and of others within it."""
    _note(config, noted)
    for value in vars(config).values():
        if type(value).__name__.endswith("Config"):
            _note_config(value, noted)


def _note(of: Any, noted: list[object]) -> None:
    """What an object is; numbers, words, switches and functions among its attributes, and which hooks it has."""
    note = noted.append
    note(type(of))
    for name, value in vars(of).items():
        kind = type(value)
        if kind in COLLECTIONS:
            if value and name not in TOLD_APART:
                note(name)
                note(kind)  # else what follows could be other attributes' names and values
                note(len(value))
                if kind is dict or kind is OrderedDict:
                    for key in value:
                        note(key if type(key) in PLAIN else type(key))
                    value = value.values()
                for member in value:  # or what it is where it cannot be compared
                    note(member if type(member) in PLAIN else type(member))
        elif kind in PLAIN:
            note(name)
            note(value)
        elif callable(value) and not isinstance(value, torch.nn.Module):
            note(name)
            noted += _itself(value)
