"""README.md shows the rooms as they are, and says who it is for in five lines."""

import re

from page_blocks import ROOT, blocks


def test_the_rooms_in_readme_are_the_rooms() -> None:
    (tree,) = [block.text for block in blocks(ROOT / "README.md") if block.language == "text"]
    named = set(re.findall(r"^(\S+)(?:  |, tests)", tree, re.MULTILINE))
    rooms = {"clients", "server", "experiments"}
    rooms |= {f"fedsim/{path.parent.name}" for path in (ROOT / "fedsim").glob("*/__init__.py")}
    assert named - {"benchmarks"} == rooms


def test_who_it_is_for_takes_five_lines() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^- .*", text.split("fedsim is for", 1)[1].split("\n\n", 2)[1], re.MULTILINE)) == 5
