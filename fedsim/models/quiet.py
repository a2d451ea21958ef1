"""Keep transformers from printing its bars and tables: what matters in them is checked and said by us."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it, transformers shows no progress bar and logs errors alone."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
