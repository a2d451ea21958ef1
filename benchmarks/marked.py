"""The part of a page that a command wrote, between two lines that no reader sees."""

import re
from pathlib import Path

from fedsim.errors import InvalidInput


def between_marks(page: Path, begin: str, end: str) -> str:
    """What stands between the two marks, without the empty lines around it.

    Raises:
        InvalidInput: As `replace_between_marks`.
    """
    found = _inside(begin, end).search(_read(page, begin, end))
    return "" if found is None else found.group().strip("\n")


def replace_between_marks(page: Path, begin: str, end: str, text: str) -> None:
    """Write text between the two marks of a page; the rest of it stays as it is.

    Raises:
        InvalidInput: The page cannot be read, or lacks a mark.
    """
    own = _read(page, begin, end)
    page.write_text(_inside(begin, end).sub(lambda _: f"\n{text}\n\n", own), encoding="utf-8")


def _inside(begin: str, end: str) -> re.Pattern[str]:
    return re.compile(f"(?<={re.escape(begin)}\n).*?(?={re.escape(end)})", re.DOTALL)


def _read(page: Path, begin: str, end: str) -> str:
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput("page", str(page), "a page that can be read", f"{error.strerror}.") from None
    if f"{begin}\n" not in text or end not in text.split(f"{begin}\n", 1)[1]:
        raise InvalidInput("page", str(page), f"a page with the lines {begin} and {end}")
    return text
