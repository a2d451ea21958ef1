"""A cache of their own for the command line's tests, filled once a session."""

import os
from collections.abc import Iterator

import pytest
from mock_selection import COMMON, SIZES, SWEEP, Trained
from mock_sweep import FakeTraining

import experiments.selection.command as command

# Before anything is patched: it would keep what it found then.
import experiments.simulation  # noqa: F401
import fedsim.engine.local
import fedsim.resources
import server.app
from experiments.selection.budget import SelectionBudget, budget_of
from experiments.selection.options import SelectionConfig
from experiments.selection.runs import settings_of
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


@pytest.fixture(scope="module")
def budget() -> SelectionBudget:
    """Of a selection among three runs in expectation."""
    return budget_of(settings_of(SWEEP, COMMON), COMMON, SIZES, 500, SelectionConfig(expected_runs=3.0))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Selections are of four runs, and train nothing."""
    fake = Trained()
    monkeypatch.setattr(server.app, "train", fake)
    monkeypatch.setattr(fedsim.engine.local, "LocalGrid", lambda *_, **__: None)
    monkeypatch.setattr(command, "draw_runs", lambda *_: 4)
    return fake
