"""A page that opens from disk: one HTML file with its figures inside."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape


def write_page(path: Path, template: str, figures: dict[str, Path], **values: Any) -> Path:
    """Render a template of `experiments/report/templates/` to a file; returns the file's path.

    Args:
        path: The HTML file.
        template: The template's file name.
        figures: PNG files by caption; the page holds their content.
        values: What else the template shows. Texts of a run can hold anything, HTML included: all are escaped.
    """
    environment = Environment(
        loader=PackageLoader("experiments.report", "templates"), autoescape=select_autoescape(default=True)
    )
    embedded = [(caption, _embedded(figure)) for caption, figure in figures.items()]
    path.write_text(environment.get_template(template).render(figures=embedded, **values), encoding="utf-8")
    return path


def _embedded(figure: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(figure.read_bytes()).decode()
