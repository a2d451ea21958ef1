"""A figure as part of a page: SVG in the page's own colours and letters, with its numbers beside it.

Colours become CSS variables that the page sets for light and dark; words stay words, so that they can be read out and
found; each point that has a text tells it under the pointer.
"""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.report.figures.style import COLOURS, GREY, OTHER_COLOURS, spell_out

SVG = "http://www.w3.org/2000/svg"
HREF = "{http://www.w3.org/1999/xlink}href"
VARIABLES = {
    "#000000": "currentColor",
    "#b0b0b0": "var(--grey)",  # matplotlib's grid
    GREY: "var(--grey)",
    **{colour: f"var(--{name})" for name, colour in COLOURS.items()},
    **{colour: f"var(--other-{number})" for number, colour in enumerate(OTHER_COLOURS)},
}
"""What stands in the page for each colour that figures use; there are no others."""
NUMBERS = itertools.count()
"""Of the figures made by this process: two of a page share no id."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure of a page.

    Attributes:
        caption: What it shows.
        alt: What is to be seen in it, for those who do not see it.
        svg: The picture.
        headings: Of the table of its numbers.
        rows: Cells of that table.
        broad: Whether it has panels beside each other, and so wants the page's whole width.
    """

    caption: str
    alt: str
    svg: Markup
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    broad: bool = False


def vector(figure: Figure, alt: str, points: Mapping[str, Sequence[str]]) -> Markup:
    """A figure as an SVG element for a page.

    Args:
        figure: The figure; its lines have the ids (set_gid) that `points` speaks of.
        alt: What is to be seen.
        points: By a line's id, the text of each of its markers, in order.

    Raises:
        KeyError: The figure has a colour that the page does not know, and that might vanish on its background.
    """
    buffer = io.StringIO()
    spell_out(figure)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue().encode())
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    _tell_points(root, points)
    _name_apart(root, f"f{next(NUMBERS)}-")
    for element in root.iter():
        if (style := element.get("style")) is not None:
            element.set("style", _in_page_style(style))
    width = float(root.get("viewBox", "0 0 0 0").split()[2])
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("style", f"min-width: {0.75 * width:.0f}px; max-width: {2 * width:.0f}px")
    root.set("role", "img")
    root.set("aria-label", alt)
    ElementTree.register_namespace("", SVG)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # which escapes every text


def _tell_points(root: ElementTree.Element, points: Mapping[str, Sequence[str]]) -> None:
    """Give each marker of the named lines its text."""
    for group in root.iter(f"{{{SVG}}}g"):
        texts = points.get(group.get("id", ""), ())
        for marker, text in zip(group.iter(f"{{{SVG}}}use"), texts, strict=False):
            ElementTree.SubElement(marker, f"{{{SVG}}}title").text = text


def _name_apart(root: ElementTree.Element, prefix: str) -> None:
    """Keep the ids that something refers to, and make them unlike those of other figures."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    names = {name for pair in used for name in pair if name}
    for element in root.iter():
        if (own := element.get("id")) is not None:
            element.set("id", prefix + own) if own in names else element.attrib.pop("id")
        if (target := element.attrib.pop(HREF, None)) is not None:
            element.set("href", f"#{prefix}{target[1:]}")
        if (clip := element.get("clip-path")) is not None:
            element.set("clip-path", clip.replace("url(#", f"url(#{prefix}"))


def _in_page_style(style: str) -> str:
    """A style in the page's colours and letters."""
    style = re.sub(r"#[0-9a-f]{6}", lambda found: VARIABLES[found[0]], style)
    return re.sub(
        r"font: ([\d.]+px) [^;]*|font-family: [^;]*;?", lambda f: f"font-size: {f[1]}" if f[1] else "", style
    )
