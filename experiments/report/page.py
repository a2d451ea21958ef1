"""A page that opens from disk: one HTML file with its figures inside."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from experiments.report.figures.vector import Drawing
from fedsim.disk import os_error
from fedsim.errors import Failure


def write_page(path: Path, template: str, figures: Sequence[Drawing], **values: Any) -> Path:
    """Render a template of `experiments/report/templates/` to a file; returns the file's path.

    Args:
        path: The HTML file; the old one, if there is one, stays until the new one is whole.
        template: The template's file name.
        figures: In order.
        values: What else the template shows. Texts of a run can hold anything, HTML included: all are escaped.
    """
    environment = Environment(
        loader=PackageLoader("experiments.report", "templates"), autoescape=select_autoescape(default=True)
    )
    text = environment.get_template(template).render(figures=figures, **values)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return path


@contextmanager
def written_later(folder: Path, what: str, again: str) -> Iterator[None]:
    """Within it, a refusal of the disk is told as what it is: nothing but the report is missing.

    Args:
        folder: Where the report goes.
        what: What is complete without it.
        again: The command that writes it.

    Raises:
        Failure: The disk refused.
    """
    try:
        yield
    except Exception as error:
        if (said := os_error(error)) is None:
            raise
        raise Failure(
            f"the report cannot be written to {folder} ({said.strerror or said}), but {what} is complete and "
            f"nothing of it is lost: make room, or make the folder writable, then write the report by {again}"
        ) from error
