"""The changes: read from the files in catalogue/, one a room, and put into a copy of the tree."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from fedsim.errors import InvalidInput

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).with_name("catalogue")


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change.

    Attributes:
        room: What it is about: the name of its file.
        breaks: What no longer holds with it.
        file: The file that is changed, from the root of the repository.
        was: Text that stands in it once.
        becomes: What stands there instead.
        noticed_by: Tests that should fail, as pytest takes them, quickest first.
        short: Whether it is in the short list.
        survives: Why no test can fail; empty where one must.
    """

    room: str
    breaks: str
    file: str
    was: str
    becomes: str
    noticed_by: tuple[str, ...]
    short: bool = False
    survives: str = ""

    @property
    def name(self) -> str:
        """Tells it from others."""
        return f"{self.room}: {self.breaks}"

    def changed(self, root: Path) -> str:
        """The file's text with the change.

        Raises:
            InvalidInput: The text that it changes does not stand there exactly once.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        if (found := text.count(self.was)) != 1:
            hint = f"Adapt {FOLDER.name}/{self.room}.toml to the code."
            raise InvalidInput(self.name, f"{found} times in {self.file}", "text that stands there once", hint)
        return text.replace(self.was, self.becomes)


def mutants() -> list[Mutant]:
    """All of them, room by room."""
    found = []
    for path in sorted(FOLDER.glob("*.toml")):
        for fields in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]:
            tests = tuple(fields.pop("noticed_by"))
            found.append(Mutant(room=path.stem, noticed_by=tests, **fields))
    return found
