"""The folder for what is costly to make again: models, docstrings, user stores."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsim.errors import InvalidInput

CACHE = "FEDSIM_CACHE"
"""The environment variable that names the folder."""


def default_cache() -> Path:
    """The folder of the environment variable FEDSIM_CACHE, or ~/.cache/fedsim."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "fedsim")


def unwritable(cache: Path, error: OSError) -> InvalidInput:
    """What to say where the operating system does not let the cache be written."""
    hint = "Set the environment variable FEDSIM_CACHE to a folder that can be written."
    return InvalidInput("FEDSIM_CACHE", str(cache), f"a folder that can be written ({error})", hint)


@contextmanager
def written_to(cache: Path) -> Iterator[None]:
    """While something is put into the cache.

    Raises:
        InvalidInput: Names FEDSIM_CACHE, where the operating system refuses.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(cache, error) from error
