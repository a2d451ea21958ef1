"""Named settings: one TOML file each, whose values become the defaults of a command."""

import tomllib
from pathlib import Path
from typing import Any

from fedsim.config import from_nested
from fedsim.errors import InvalidInput

FOLDER = Path(__file__).parent


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


def load_preset(kind: type, name: str) -> Any:
    """A command's dataclass with the values of a preset: a name, or the path of a TOML file.

    Raises:
        InvalidInput: For an unknown preset, a file that is no TOML, or a value that is not allowed.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not name or not path.is_file():
        raise InvalidInput("preset", name, "a TOML file or one of " + ", ".join(preset_names()))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput("preset", name, "a TOML file", f"{error}.") from None
    # Presets describe a training run; a command with other fields says what of that it uses.
    chosen = kind.preset_values(values) if hasattr(kind, "preset_values") else values
    return from_nested(kind, chosen)
