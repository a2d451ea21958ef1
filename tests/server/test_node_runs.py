"""Runs of nodes that were lost: they go on, what they repeat is charged, or they say why they cannot."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from mock_nodes import PLANNED, SETTINGS, StockGrid, initial_arrays, node_app, train, values_of

from experiments.confirmation import confirm_folder
from fedsim.engine.local import LocalGrid
from fedsim.errors import Failure, InvalidInput
from fedsim.plan.nodes import NodePlan
from fedsim.privacy.ledger import MODEL_UPDATE, read_entries
from server.strategy import UserLevelDP


class Lost(Exception):
    """The server's machine goes away."""


@pytest.mark.parametrize("when", ["asked", "released"])
def test_a_lost_run_goes_on_and_charges_what_it_repeats(tmp_path: Path, when: str) -> None:
    class Failing(StockGrid):
        pushed = 0

        def push_messages(self, messages: Iterable[Message]) -> list[Any]:
            self.pushed += 1
            if when == "asked" and self.pushed == 2:
                raise Lost
            return super().push_messages(messages)

    def evaluated(number: int, arrays: ArrayRecord) -> None:
        if when == "released" and number == 2:
            raise Lost

    def run(grid: Grid, folder: Path = tmp_path, **more: Any) -> Any:
        strategy = UserLevelDP(**{**SETTINGS, "output": folder, **more})
        return strategy.start(grid, initial_arrays(), num_rounds=4, evaluate_fn=evaluated)

    with pytest.raises(Lost):
        run(Failing(node_app(), 12))
    charged = len(read_entries(tmp_path / "ledger.jsonl"))
    assert charged == 2
    with pytest.raises(InvalidInput, match="resume=True"):
        run(StockGrid(node_app(), 12))
    with pytest.raises(InvalidInput, match="as in the run that goes on"):
        run(StockGrid(node_app(), 12), resume=True, clip_norm=2.0)
    when = ""
    result = run(StockGrid(node_app(), 12), resume=True)
    entries = read_entries(tmp_path / "ledger.jsonl")
    repeated = [1] if charged == 2 and [e.round for e in entries].count(1) == 2 else []
    assert sorted(e.round for e in entries if e.purpose == MODEL_UPDATE) == sorted([0, 1, 2, 3, *repeated])
    stated = json.loads((tmp_path / "privacy.json").read_text(encoding="utf-8"))
    plan = NodePlan(**{**PLANNED, "steps": 4})
    assert stated["epsilon"]["upper"] == plan.epsilon(len(entries)).upper
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2, 3, 4]
    undisturbed = run(StockGrid(node_app(), 12), tmp_path / "undisturbed")
    assert np.array_equal(values_of(result.arrays), values_of(undisturbed.arrays)) == (not repeated)
    with pytest.raises(InvalidInput, match="as in the run that goes on"):
        run(StockGrid(node_app(), 12), resume=True, clip_norm=2.0)
    again = run(StockGrid(node_app(), 12), resume=True)
    assert np.array_equal(values_of(again.arrays), values_of(result.arrays))


def test_a_run_with_secure_noise_goes_on(tmp_path: Path) -> None:
    seeds: dict[str, Any] = {"sampling_seed": None, "noise_seed": None, "resume": True}

    class Failing(StockGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[Any]:
            if self.asked and next(iter(messages)).metadata.group_id == "3":
                raise Lost
            return super().push_messages(messages)

    with pytest.raises(Lost):
        train(tmp_path, Failing(node_app(), 12), rounds=4, sampling_probability=0.9, **seeds)
    ledger = (tmp_path / "ledger.jsonl").read_bytes()
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(InvalidInput, match="Put the ledger back"):
        train(tmp_path, rounds=4, sampling_probability=0.9, **seeds)
    (tmp_path / "ledger.jsonl").write_bytes(ledger)
    train(tmp_path, rounds=4, sampling_probability=0.9, **seeds)
    assert [entry.round for entry in read_entries(tmp_path / "ledger.jsonl")] == [0, 1, 2, 2, 3]
    assert confirm_folder(tmp_path, (), as_json=True) == 0


def test_a_run_that_kept_nothing_and_spent_all_trains_nothing(tmp_path: Path) -> None:
    limit = NodePlan(**PLANNED).epsilon(2).upper
    settings: dict[str, Any] = {"epsilon": limit, "checkpoint_rounds": 0, "resume": True}

    def evaluated(number: int, arrays: ArrayRecord) -> None:
        if number == 2:
            raise Lost

    for reason in (Lost, Failure):
        strategy = UserLevelDP(**{**SETTINGS, "output": tmp_path, **settings})
        with pytest.raises(reason):
            strategy.start(LocalGrid(node_app(), workers=12), initial_arrays(), num_rounds=4, evaluate_fn=evaluated)
    assert len(read_entries(tmp_path / "ledger.jsonl")) == 2
    assert not (tmp_path / "privacy.json").exists()
