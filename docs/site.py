"""Builds the site: `python docs/site.py` leaves it in build/site, or says which links lead nowhere and ends with 1."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
ABOUT = {
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Files of the repository that are pages, and what they are called there."""
FACE = Path("api/index.md")
OURS = ("fedsim", "clients", "server", "experiments")


def main() -> int:
    """Gather the pages, build them strictly, and follow every link of what came out."""
    gather(ROOT / "docs", ROOT / "build" / "pages")
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT, check=False
    ).returncode
    if built != 0:
        return built
    site = ROOT / "build" / "site"
    dead = sorted(dead_links(site))
    print(*dead, f"{len(list(site.rglob('*.html')))} pages in {site}, {len(dead)} dead links", sep="\n")
    return 1 if dead else 0


def gather(docs: Path, pages: Path) -> None:
    """What the site is built from: docs, the files about the project, and each name that `import fedsim` offers."""
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(docs, pages, ignore=shutil.ignore_patterns("*.py", "*.jsonl", "__pycache__"))
    for name, page in ABOUT.items():
        (pages / page).write_text(as_page((ROOT / name).read_text(encoding="utf-8")), encoding="utf-8")
    with (pages / FACE).open("a", encoding="utf-8") as page:
        page.write(face())


def as_page(text: str) -> str:
    """A file of the repository with its links as they are on the site."""
    return re.sub(r"\]\((\w+\.md)", lambda link: f"]({ABOUT.get(link[1], link[1])}", text.replace("](docs/", "]("))


def face() -> str:
    """A directive of mkdocstrings for each name in `fedsim.__all__` that has documentation of its own."""
    sys.path.insert(0, str(ROOT))
    import fedsim

    values = [getattr(fedsim, name) for name in sorted(getattr(fedsim, "__all__", ()), key=str.lower)]
    places = [
        f"{value.__module__}.{value.__qualname__}"
        for value in values
        if getattr(value, "__module__", "").partition(".")[0] in OURS and hasattr(value, "__qualname__")
    ]
    places.sort(key=lambda place: not place.startswith("experiments."))  # what trains comes first
    return "".join(f"\n\n::: {place}\n" for place in places)


class Page(HTMLParser):
    """Where a page's links lead, what it loads, and what can be linked to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        loaded = values.get("href") if tag == "link" and values.get("rel") != "canonical" else values.get("src")
        if loaded is not None:
            self.loads.append(loaded)


def dead_links(site: Path) -> Iterator[str]:
    """Links within a built site that lead nowhere, and whatever its pages would load from elsewhere."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        if path.name == "404.html" or "reports" in path.parts:  # the one has absolute links, the others stand alone
            continue
        for link in dict.fromkeys([*page.links, *page.loads]):
            where = f"{path.relative_to(site)}: {link}"
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads and parts.scheme != "data":
                    yield f"{where} is loaded from elsewhere"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                yield f"{where} is not there"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{where} has no such anchor"


if __name__ == "__main__":
    sys.exit(main())
