"""Runs whose workers form the sums, noise them and step: the model of today's path, bit for bit, or a refusal."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import ray
from crashes import crashed, weights
from flwr.serverapp import Grid
from small_runs import ROUNDS, trained

from experiments import simulation
from experiments.confirmation import confirm_folder
from experiments.run import main
from fedsim.config import EngineConfig, NoiseConfig, OptimizerConfig, RunConfig
from fedsim.engine.local import LocalGrid
from fedsim.engine.ray_grid import RayGrid
from fedsim.errors import InvalidInput
from fedsim.models.config import SmallModelConfig
from fedsim.privacy.ledger import MODEL_UPDATE, read_entries
from fedsim.privacy.mechanisms import MECHANISMS
from server.app import train
from server.callbacks.callback import Callback
from server.results.run_folder import RunFolder
from server.round import Budget

SERVER = EngineConfig(kind="local", workers=1, exact=True, max_tokens=64)
WORKERS = dataclasses.replace(SERVER, kind="ray", workers=3, sums="workers")
PLAIN = {"gaussian", "layer-noise", "matrix-noise"}


@pytest.fixture
def wide(small_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """Runs of a model that has coordinates for each of three workers, with every state that an optimizer can have."""
    small = SmallModelConfig(layers=1, width=128, heads=2, context=16, vocabulary_size=300, steps=2, batch_rows=2)

    def of(output: Path, engine: EngineConfig, **changes: Any) -> RunConfig:
        adam = OptimizerConfig(name="adam", schedule="linear", average="exponential")
        config = small_run(output, engine=engine, **{"optimizer": adam, **changes})
        return dataclasses.replace(config, model=dataclasses.replace(config.model, small=small))

    return of


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def charged(folder: Path) -> list[int]:
    return [one.round for one in read_entries(folder / "ledger.jsonl") if one.purpose == MODEL_UPDATE]


GRIDS: dict[int, RayGrid] = {}
"""The workers of all runs on Ray of so many: they have the same model and store, whichever folder a run is for."""
KILLED: list[int] = []


@pytest.fixture(scope="module")
def grids() -> Iterator[None]:
    """Room for workers of two runs at a time."""
    ray.init(num_cpus=5, include_dashboard=False, object_store_memory=256 << 20, log_to_driver=False)
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        clients = simulation.simulated_clients

        @contextlib.contextmanager
        def started_once(config: RunConfig) -> Iterator[Grid]:
            if config.engine.kind == "local":
                with clients(config) as grid:
                    yield grid
                return
            if (workers := config.engine.workers or 0) not in GRIDS:
                made = stack.enter_context(clients(config))
                assert isinstance(made, RayGrid)
                GRIDS[workers] = made
            yield GRIDS[workers]

        patch.setattr(simulation, "simulated_clients", started_once)
        yield
    GRIDS.clear()
    ray.shutdown()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs that several tests begin with."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def whole(grids: None, runs: Path, wide: Callable[..., RunConfig]) -> Path:
    """The run of today's path."""
    folder = runs / "whole"
    if not folder.exists():
        trained(wide(folder, SERVER))
    return folder


@pytest.fixture
def broken_off(
    grids: None, runs: Path, tmp_path: Path, wide: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> Callable[[EngineConfig], RunConfig]:
    """broken_off(engine): how to go on with a run that crashed in round 5."""

    def of(engine: EngineConfig) -> RunConfig:
        folder, run = runs / engine.kind, tmp_path / "run"
        if not folder.exists():
            crashed(wide(folder, engine), monkeypatch, rounds=5)
        shutil.copytree(folder, run)
        return wide(run, engine, resume=str(run))

    return of


def kill_one() -> None:
    KILLED.append(sorted(GRIDS[3].process_ids.values())[len(KILLED) % 2])
    os.kill(KILLED[-1], signal.SIGKILL)


class Kills(Callback):
    """Kills a worker between two rounds: it takes coordinates with it."""

    def on_record(self, record: dict[str, Any]) -> None:
        if record["round"] == 3:
            kill_one()


def kill_in(monkeypatch: pytest.MonkeyPatch, round: int) -> None:
    """Kill a worker in a round that is charged already and has not left: it takes its part of the sum with it, too."""
    original = Budget.charge

    def charge(self: Budget, number: int) -> None:
        original(self, number)
        if number == round:
            kill_one()

    monkeypatch.setattr(Budget, "charge", charge)


def test_the_model_is_that_of_the_servers_sums_and_what_is_told_too(
    tmp_path: Path, whole: Path, wide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(wide(tmp_path / "workers", WORKERS))
    kill_in(monkeypatch, round=6)
    trained(wide(tmp_path / "killed", WORKERS, callbacks=(f"{__name__}:Kills",)))
    assert len(KILLED) == 2
    expected = records(whole)
    for name in ("workers", "killed"):
        assert weights(tmp_path / name) == weights(whole)
        assert charged(tmp_path / name) == list(range(ROUNDS))
        assert confirm_folder(tmp_path / name, (), as_json=True) == 0
        found = records(tmp_path / name)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            told = {key: value for key, value in theirs.items() if isinstance(value, float)}
            assert {key: ours[key] for key in told} == pytest.approx(told, rel=1e-5)
            units = {key: value for key, value in theirs["not_private"].items() if "unit" in key or key == "rows"}
            assert {key: ours["not_private"][key] for key in units} == pytest.approx(units)
    ours, theirs = (json.loads((run / "privacy.json").read_text()) for run in (tmp_path / "workers", whole))
    assert ours["epsilon"] == theirs["epsilon"]
    assert main(["account", "--check", str(tmp_path / "killed")]) == 0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (WORKERS, SERVER),
        (SERVER, WORKERS),
        (WORKERS, dataclasses.replace(WORKERS, workers=2)),
    ],
)
def test_a_run_goes_on_where_its_sums_are_formed_elsewhere(
    tmp_path: Path, whole: Path, broken_off: Callable[..., RunConfig], before: EngineConfig, after: EngineConfig
) -> None:
    trained(dataclasses.replace(broken_off(before), engine=after))
    assert weights(tmp_path / "run") == weights(whole)
    assert charged(tmp_path / "run") == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9]  # the checkpoint knew of four
    assert confirm_folder(tmp_path / "run", (), as_json=True) == 0


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("engine.sums", {"engine": {"kind": "local"}}),
        ("engine.devices-per-worker", {"engine": {"devices_per_worker": 2}}),
        ("engine.users-per-message", {"engine": {"users_per_message": 1}}),
        ("noise.secure", {"noise": NoiseConfig(secure=True), "noise_seed": None}),
        ("plan.bands", {"plan": {"bands": "4"}}),
        ("plan.buffers", {"plan": {"buffers": 1, "sampling": "none"}}),
        ("plan.clip-quantile", {"plan": {"clip_quantile": 0.5}}),
    ],
)
def test_an_option_that_does_not_go_with_it_is_refused(
    tmp_path: Path, small_run: Any, field: str, changes: dict[str, Any]
) -> None:
    def config() -> RunConfig:
        made: RunConfig = small_run(tmp_path / "run")
        engine = dataclasses.replace(WORKERS, **changes.get("engine", {}))
        plan = dataclasses.replace(made.plan, **changes.get("plan", {}))
        others = {name: value for name, value in changes.items() if name not in ("engine", "plan")}
        return dataclasses.replace(made, engine=engine, plan=plan, **others)

    with pytest.raises(InvalidInput) as refusal:
        config()
    assert refusal.value.field == field
    assert "--engine." in str(refusal.value)


class Elsewhere(LocalGrid):
    """Passes for workers of their own, so that what is refused before them is seen."""

    in_process = False


@pytest.mark.parametrize("mechanism", sorted(set(MECHANISMS) - PLAIN))
def test_a_mechanism_whose_noise_is_of_the_whole_sum_is_refused_before_there_is_a_folder(
    tmp_path: Path, small_run: Any, mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(RunFolder, "make")
    folder = tmp_path / "run"
    made = small_run(folder, engine=WORKERS)
    bands = "2" if mechanism == "banded" else None
    plan = dataclasses.replace(made.plan, mechanism=mechanism, bands=bands)

    def begun() -> None:
        train(Elsewhere("clients.app:app", {}), dataclasses.replace(made, plan=plan))

    with pytest.raises(InvalidInput, match=r"Workers release each its own coordinates|made of the whole"):
        begun()
    assert not folder.exists()


def test_workers_that_cannot_meet_are_refused_before_there_is_a_folder(tmp_path: Path, small_run: Any) -> None:
    config = small_run(tmp_path / "run", engine=WORKERS)
    for grid in (LocalGrid("clients.app:app", {}), Mock(spec=Grid)):
        with pytest.raises(InvalidInput, match="Only Ray actors"):
            train(grid, config)
    assert not (tmp_path / "run").exists()
