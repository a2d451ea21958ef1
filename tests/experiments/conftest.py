"""A cache of their own for the command line's tests, filled once a session."""

import os
from collections.abc import Iterator

import pytest
from mock_sweep import FakeTraining

# Before anything is patched: it would keep what it found then.
import experiments.simulation  # noqa: F401
import fedsim.engine.local
import fedsim.resources
import server.app
from experiments.sweep.command import Sweep


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


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    """Sweeps train nothing, and predict nothing."""
    fake = FakeTraining()
    monkeypatch.setattr(server.app, "train", fake)
    monkeypatch.setattr(fedsim.engine.local, "LocalGrid", lambda *_, **__: None)
    monkeypatch.setattr(fedsim.resources, "open_resources", lambda *_, **__: None)
    monkeypatch.setattr(Sweep, "_predict", lambda *_: {})
    return fake
