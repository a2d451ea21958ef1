"""Configurations as flat names and scalars (Flower's run_config), or as nested mappings (presets), and back."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from fedsim.errors import InvalidInput


def to_flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The configuration as Flower's run_config: dotted names to scalars; unset fields are left out."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        name = f"{prefix}{item.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            flat |= to_flat(value, name + ".")
        elif isinstance(value, (list, tuple)):
            flat[name] = json.dumps(list(value))
        elif value is not None:
            flat[name] = str(value) if isinstance(value, Path) else value
    return flat


def from_flat(kind: type, flat: typing.Mapping[str, Any]) -> Any:
    """The configuration that to_flat described; fields not named keep their defaults.

    Raises:
        InvalidInput: For a name that is no field, or a value of the wrong type.
    """
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.replace("-", "_").split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise InvalidInput(name, value, "a field of the configuration", f"{parent} has no parts.")
        place[leaf] = value
    return from_nested(kind, nested)


def from_nested(kind: type, nested: typing.Mapping[str, Any], prefix: str = "") -> Any:
    """A configuration dataclass from nested mappings (a preset file, a stored config.json).

    Raises:
        InvalidInput: For a name that is no field, or a value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in nested.items():
        key = name.replace("-", "_")
        shown = prefix + name.replace("_", "-")
        if key not in hints:
            known = ", ".join(sorted(hint.replace("_", "-") for hint in hints))
            raise InvalidInput(shown, value, f"one of the fields {known}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, typing.Mapping):
                raise InvalidInput(shown, value, "a group of fields")
            values[key] = from_nested(hints[key], value, shown + ".")
        else:
            values[key] = _typed(shown, value, hints[key])
    return kind(**values)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """value as the field's type, refusing what would need guessing."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in options:
            raise InvalidInput(name, value, "one of " + ", ".join(map(str, options)))
        return value
    if origin in (typing.Union, types.UnionType):
        # Flower's run_config has no null: an empty string leaves an optional field unset.
        if value in (None, "") and type(None) in options:
            return None
        return _typed(name, value, next(option for option in options if option is not type(None)))
    if origin in (tuple, list):
        try:
            items = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            items = None
        if not isinstance(items, (list, tuple)):
            raise InvalidInput(name, value, "a list, as JSON")
        return tuple(_typed(name, item, options[0]) for item in items)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise InvalidInput(name, value, "a number") from None
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InvalidInput(name, value, f"of type {hint.__name__}")
    return value
