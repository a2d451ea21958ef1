"""Keep transformers from printing its bars and tables: what matters in them is checked and said by us."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import logging as transformers_logging

RENAMED = "`is_gradient_checkpointing` is deprecated"
"""How transformers tells PEFT that a property it reads has a new name: nothing that a person here can act on."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it, transformers shows no progress bar, logs errors alone, and does not tell PEFT of a renaming."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it without types
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=RENAMED, category=FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # see above
