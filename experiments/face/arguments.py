"""Keywords for every field of a configuration, and what is wrong with them in the spelling of Python.

A field's keyword is its own name where no other field has it (`clip_norm`, `lora_rank`), and always its name behind
that of its group (`plan_clip_norm`, `optimizer_name`, `model_small_layers`).
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_type_hints

from fedsim.config import from_nested
from fedsim.errors import InvalidInput
from fedsim.privacy.mechanisms import MECHANISMS, Mechanism
from fedsim.registry import Choices
from fedsim.sampling import SAMPLINGS, Sampling
from fedsim.suggestions import suggested

OWN = {"rounds": ("plan", "rounds"), "learning_rate": ("optimizer", "learning_rate")}
"""Names that several fields have, and which of these is meant."""
OWN |= {name: ("plan", name) for name in ("group_size", "clip_norm")} | {"average": ("optimizer", "average")}
VAGUE = {"name", "kind", "keep", "minutes", "every", "seed", "source", "path", "address"}
"""Names that say something in their group alone."""

REGISTRIES: dict[type, Choices[Any]] = {Mechanism: MECHANISMS, Sampling: SAMPLINGS}
"""What may be given as a class."""

Path = tuple[str, ...]


def keywords(kind: type) -> dict[str, Path]:
    """The field that each keyword sets, as the way to it from the configuration."""
    ways = list(_fields(kind))
    counts = Counter(way[-1] for way in ways)
    short = {way[-1]: way for way in ways if counts[way[-1]] == 1 and len(way) < 3 and way[-1] not in VAGUE}
    return short | OWN | {"_".join(way): way for way in ways}


def configured(kind: type, options: Mapping[str, Any], begun: Any | None = None) -> Any:
    """The configuration that keywords describe.

    Args:
        kind: A dataclass of options.
        options: Values by keyword; None leaves a field as it is.
        begun: What fields are that no keyword names; by default the defaults.

    Raises:
        InvalidInput: There is no such keyword, one field is given twice, or a value is not allowed.
    """
    known = keywords(kind)
    require_known(kind, options)
    nested: dict[str, Any] = {} if begun is None else _nested(begun)
    named: dict[Path, str] = {}
    for name, value in options.items():
        if value is None:
            continue
        way = known[name]
        if way in named:
            raise InvalidInput(name, value, f"left out beside {named[way]}, which means the same")
        named[way] = name
        place = nested
        for part in way[:-1]:
            place = place.setdefault(part, {})
        place[way[-1]] = _plain(value)
    return from_nested(kind, _of_tuples(kind, nested))


def require_known(kind: type, options: Mapping[str, Any]) -> None:
    """Refuse keywords that there are not, before anything is made of the others.

    Raises:
        InvalidInput: Names one, and what may have been meant.
    """
    known = keywords(kind)
    for name, value in options.items():
        if name not in known:
            raise InvalidInput(name, value, "a keyword that there is", _suggestion(name, known))


@contextmanager
def spelt_for_python(kind: type) -> Iterator[None]:
    """Within it, an InvalidInput that names options of the command line is raised with keywords in their place."""
    try:
        yield
    except InvalidInput as error:
        allowed, hint = (in_python(kind, text) for text in (error.allowed, error.hint))
        raise InvalidInput(in_python(kind, error.field), error.value, allowed, hint) from error


def in_python(kind: type, text: str) -> str:
    """A sentence for the command line, as a sentence about keywords.

    >>> from fedsim.config import RunConfig
    >>> in_python(RunConfig, "Set --plan.clip-norm, or leave out model.lora-rank; see --resume runs/a.")
    "Set clip_norm, or leave out lora_rank; see resume='runs/a'."
    """
    known = keywords(kind)
    names: dict[str, str] = {}
    for name, way in sorted(known.items(), key=lambda item: len(item[0])):  # the shortest name of each
        option = ".".join(way).replace("_", "-")
        names.setdefault(option, "rows" if way == ("data", "path") else "model" if way == ("model", "path") else name)
    text = re.sub(r"(?:train )?--resume (\S+?)([.,;)]*)(?=\s|$)", r"resume='\1'\2", text)

    def keyword(found: re.Match[str]) -> str:
        dashes, option = found.groups()
        if option not in names or not (dashes or "." in option or "-" in option):
            return found.group()
        return names[option]

    return re.sub(r"(--)?([a-z0-9]+(?:[.-][a-z0-9]+)*)", keyword, text)


def _fields(kind: type, way: Path = ()) -> Iterator[Path]:
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _fields(hints[item.name], (*way, item.name))
        else:
            yield (*way, item.name)


def _suggestion(name: str, known: Mapping[str, Path]) -> str:
    """Keywords that may have been meant."""
    few = suggested(name, known, first=OWN, most=5)
    return f"Did you mean {', '.join(few)}?" if few else "help(fedsim.RunConfig) has all of them."


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's; a mechanism or sampling scheme as what it is called."""
    if isinstance(value, type):
        registry = next((one for kind, one in REGISTRIES.items() if issubclass(value, kind)), None)
        return value if registry is None else registry.name_of(value)
    return value.item() if hasattr(value, "item") and not hasattr(value, "__len__") else value


def _nested(config: Any) -> dict[str, Any]:
    return {
        item.name: _nested(value) if dataclasses.is_dataclass(value := getattr(config, item.name)) else value
        for item in dataclasses.fields(config)
    }


def _of_tuples(kind: type, nested: Mapping[str, Any]) -> dict[str, Any]:
    """One string where several are allowed is the only one."""
    hints = get_type_hints(kind)
    made: dict[str, Any] = {}
    for name, value in nested.items():
        if dataclasses.is_dataclass(hints[name]):
            made[name] = _of_tuples(hints[name], value)
        else:
            several = getattr(hints[name], "__origin__", None) is tuple
            made[name] = (value,) if several and isinstance(value, str) else value
    return made
