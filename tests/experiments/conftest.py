"""A cache of their own for the command line's tests, filled once a session."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """FEDSIM_CACHE points into the session's temporary folder."""
    before = os.environ.get("FEDSIM_CACHE")
    os.environ["FEDSIM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["FEDSIM_CACHE"]
    else:
        os.environ["FEDSIM_CACHE"] = before
