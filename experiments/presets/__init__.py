"""Named settings: one TOML file each, whose values become the defaults of a command."""

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsim.config import from_nested
from fedsim.errors import InvalidInput
from fedsim.plan import ALGORITHMS

FOLDER = Path(__file__).parent
SECTIONS = {*ALGORITHMS, "sweep"}
"""Sections that only some commands have; the others leave them out."""


def preset_names() -> list[str]:
    """The presets there are."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def preset_name(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of --preset (or --preset=…), and the other arguments."""
    rest: list[str] = []
    name: str | None = None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--preset":
            name = next(remaining, "")
        elif argument.startswith("--preset="):
            name = argument.removeprefix("--preset=")
        else:
            rest.append(argument)
    return name, rest


def _value(option: str, arguments: Sequence[str]) -> str | None:
    """What an option is given, the last time that it is."""
    found = None
    for place, argument in enumerate(arguments):
        if argument == option:
            found = arguments[place + 1] if place + 1 < len(arguments) else None
        elif argument.startswith(f"{option}="):
            found = argument.removeprefix(f"{option}=")
    return found


def load_preset(kind: type, name: str, arguments: Sequence[str] = ()) -> Any:
    """A command's dataclass with the values of a preset: a name, or the path of a TOML file.

    Args:
        kind: The dataclass.
        name: The preset.
        arguments: What else is on the command line: a preset whose text is in files that nobody but the person has
            says in `corpus` what they hold, and the person where they are.

    Raises:
        InvalidInput: For an unknown preset, a file that is no TOML, or a value that is not allowed; or files are
            needed, and --data.path does not say where they are.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not name or not path.is_file():
        raise InvalidInput("preset", name, "a TOML file or one of " + ", ".join(preset_names()))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput("preset", name, "a TOML file", f"{error}.") from None
    if (corpus := values.pop("corpus", None)) is not None and isinstance(data := values.get("data"), dict):
        data["path"] = _value("--data.path", arguments)
        if not data["path"]:
            raise InvalidInput("data.path", None, f"given with --preset {name}", f"It is for {corpus}.")
    # A preset describes a training run, with sections for some commands; planning says what of that it uses.
    if hasattr(kind, "preset_values"):
        return from_nested(kind, kind.preset_values(values, arguments))
    known = {item.name for item in dataclasses.fields(kind)}
    return from_nested(kind, {key: value for key, value in values.items() if key in known or key not in SECTIONS})
