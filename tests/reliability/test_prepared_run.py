"""A run over a store that was prepared with rows of another length than the configuration would cut now."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import trained

from clients.worker import Worker
from experiments import simulation
from fedsim.config import EngineConfig, RunConfig
from fedsim.data.config import DataConfig
from fedsim.data.ingest import build_store
from fedsim.engine.devices import Devices
from fedsim.engine.slices import Measured
from fedsim.resources import open_resources
from server.precautions import trial
from server.round import Round


@pytest.fixture
def over_store(small_run: Callable[..., RunConfig], tmp_path: Path) -> Callable[[int], RunConfig]:
    """over_store(length): the small run over a store prepared with rows of at most so many tokens."""

    def prepared(length: int) -> RunConfig:
        config = small_run(tmp_path / f"run-{length}")
        data = dataclasses.replace(config.data, sequence_length=length)
        build_store(data, open_resources(config).loaded.tokenizer, tmp_path / f"store-{length}")
        return dataclasses.replace(config, data=DataConfig(source="store", path=str(tmp_path / f"store-{length}")))

    return prepared


@pytest.mark.parametrize("length", [8, 16])
def test_rows_are_as_long_as_they_were_prepared(
    over_store: Callable[[int], RunConfig], monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """What configurations say by default is more than the model can read."""
    config = over_store(length)
    assert config.data.sequence_length == 64
    monkeypatch.setattr(trial, "_exported", {})
    asked: list[tuple[int, int]] = []
    costs: list[int] = []
    work, costing = Worker.work, Round._costs

    def noted(self: Worker, max_tokens: int) -> int:
        asked.append((max_tokens, self.computing.row_tokens))
        return work(self, max_tokens)

    def costed(self: Round, units: object) -> object:
        costs.append(self.row_tokens)
        return costing(self, units)  # type: ignore[arg-type]

    monkeypatch.setattr(Worker, "work", noted)
    monkeypatch.setattr(Round, "_costs", costed)
    assert trained(config)["rounds"] == 10
    assert set(asked) == {(trial.ROWS * length, length)}
    assert set(costs) == {length}


def test_slices_are_measured_with_rows_as_long_as_they_are(
    over_store: Callable[[int], RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def measured(make_grid: object, workers: list[int], sizes: list[int]) -> list[Measured]:
        tried.extend(sizes)
        return [Measured(workers=1, max_tokens=sizes[0], tokens_per_second=1.0)]

    monkeypatch.setattr("fedsim.engine.slices.try_slices", measured)
    config = dataclasses.replace(over_store(8), engine=EngineConfig(workers=0))
    resources = open_resources(config)
    size, row_tokens = resources.loaded.layout.size, resources.row_tokens
    chosen = simulation.with_measured_slices(config, size, row_tokens, Devices(cores=2, gpus=0))
    assert tried == [8 * rows for rows in (4, 16, 64, 256)]
    assert chosen.engine.max_tokens == 32


def test_a_configuration_that_cuts_rows_and_its_store_agree(small_run: Callable[..., RunConfig]) -> None:
    assert open_resources(small_run("")).row_tokens == 16
