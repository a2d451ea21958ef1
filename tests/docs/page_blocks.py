"""The fenced blocks of a page, and what the comments before each ask of whoever runs it (see CONTRIBUTING.md)."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("bash", "console", "diff", "python", "text")
MARKS = ("needs", "run by", "given", "then", "smaller", "exit", "varies")
CLONE = "a clone"
NEEDS = ("a GPU", "two machines", "the hub", "the corpora", CLONE)
"""What a reader needs and a test has not. A number of minutes is the other thing that a block can need."""

_COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)
_BLOCK = re.compile(
    r"(?P<comments>(?:^ *<!--(?:(?!-->).)*-->\s*?\n\s*?)*)"
    r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block.

    Attributes:
        page: The page's path in the repository.
        line: Where its fence begins.
        language: What stands behind the fence.
        text: What is in it, without the page's indentation.
        marks: What the comments before it say, by the word that they begin with.
    """

    page: str
    line: int
    language: str
    text: str
    marks: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def minutes(self) -> float:
        """How long it takes, where it says so; infinite where another test runs it or it needs what no test has."""
        if "run by" in self.marks:
            return float("inf")
        needed = [one for one in self.marks.get("needs", ()) if one != CLONE]
        return max(map(_minutes, needed), default=float("inf") if self.in_clone else 0.0)

    @property
    def in_clone(self) -> bool:
        """Whether it is for the root of a clone; such a block is run only where it says how long it takes."""
        return CLONE in self.marks.get("needs", ())

    def faults(self) -> Iterator[str]:
        """Why nobody would know what to do with this block."""
        if self.language not in LANGUAGES:
            yield f"{self.place}: its language is {self.language!r}; it must be one of {', '.join(LANGUAGES)}"
        for word, values in self.marks.items():
            if word not in MARKS:
                yield f"{self.place}: no comment begins with {word!r}"
            if word == "needs":
                yield from (f"{self.place}: nobody knows what {one!r} is" for one in values if _minutes(one) <= 0)
            if word == "run by":
                yield from self._untrue(values)

    def _untrue(self, tests: Sequence[str]) -> Iterator[str]:
        for name in tests:
            test = ROOT / name
            if not test.is_file() or Path(self.page).stem not in test.read_text(encoding="utf-8"):
                yield f"{self.place}: {name} is said to run it, and is not there or does not name the page"


def _minutes(needed: str) -> float:
    if needed in NEEDS:
        return float("inf")
    number = re.fullmatch(r"(\d+) minutes?", needed)
    return float(number[1]) if number else 0.0


def pages() -> list[Path]:
    """README and everything under docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """A page's fenced blocks, from above."""
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
    found = []
    for match in _BLOCK.finditer(text):
        marks: dict[str, list[str]] = {}
        for comment in _COMMENT.findall(match["comments"]):
            word, _, rest = comment.partition(":")
            marks.setdefault(word.strip(), []).append(rest.strip("\n") if "\n" in rest else rest.strip())
        line = text.count("\n", 0, match.start("indent")) + 1
        code = textwrap.dedent(match["text"])
        found.append(Block(page=name, line=line, language=match["language"].strip(), text=code, marks=marks))
    return found
