"""The site builds strictly, every page can be reached, no link is dead, and nothing is loaded from elsewhere."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from page_blocks import ROOT


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """docs/site.py, which has the name of a module of the standard library."""
    found = importlib.util.spec_from_file_location("docs_site", ROOT / "docs" / "site.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_site_builds_and_no_link_is_dead() -> None:
    built = subprocess.run(
        [sys.executable, "docs/site.py"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert "griffe" not in built.stdout + built.stderr  # a docstring that its page cannot show
    for page in (ROOT / "build" / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'(?:<script|<link rel="stylesheet"|<img)[^>]*(?:src|href)="https?://', text), page


def test_every_page_is_in_the_navigation(site: ModuleType, tmp_path: Path) -> None:
    site.gather(ROOT / "docs", tmp_path / "pages")
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]))
    there = {str(path.relative_to(tmp_path / "pages")) for path in (tmp_path / "pages").rglob("*.md")}
    assert named == there


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ('<a href="gone.html">', "is not there"),
        ('<a href="other.html#gone">', "has no such anchor"),
        ('<a href="#gone">', "has no such anchor"),
        ('<img src="gone.png">', "is not there"),
        ('<script src="https://example.org/x.js"></script>', "is loaded from elsewhere"),
        ('<link rel="stylesheet" href="https://example.org/x.css">', "is loaded from elsewhere"),
        ('<a href="other.html#here">', None),
        ('<a href="https://example.org">', None),
    ],
)
def test_a_dead_link_is_found(site: ModuleType, tmp_path: Path, link: str, fault: str | None) -> None:
    (tmp_path / "page.html").write_text(link, encoding="utf-8")
    (tmp_path / "other.html").write_text('<h1 id="here">', encoding="utf-8")
    found = list(site.dead_links(tmp_path))
    assert len(found) == (fault is not None)
    assert all(str(fault) in line for line in found)
