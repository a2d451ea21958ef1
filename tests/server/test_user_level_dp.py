"""The strategy for stock Flower: its sums are ours, its ε is certified, and nothing is spent in vain."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from mock_nodes import (
    INITIAL,
    PLANNED,
    SETTINGS,
    SIZES,
    StockGrid,
    initial_arrays,
    node_app,
    step_of,
    train,
    values_of,
)

from clients.mod import user_level_clip_mod
from experiments.confirmation import confirm_folder
from fedsim.clip import Clip
from fedsim.config import OptimizerConfig
from fedsim.engine.exact import quantise
from fedsim.engine.local import LocalGrid
from fedsim.engine.work import Gathered, Work
from fedsim.errors import Failure, InvalidInput
from fedsim.optimizer import ServerOptimizer
from fedsim.plan import UlsPlan
from fedsim.plan.nodes import NodePlan
from fedsim.privacy.ledger import read_entries
from fedsim.randomness import StreamNoise, stream
from fedsim.release import Release
from fedsim.seeds import Seeds
from server.round import Budget, Round
from server.strategy import UserLevelDP
from server.strategy.nodes import Nodes


def difference(partition: int, vector: np.ndarray) -> np.ndarray:
    """What a node makes of the weights, subtracted from them: float64."""
    parts = np.split(vector.astype(np.float64), [SIZES["weight"]])
    weights = {name: part.reshape(INITIAL[name].shape) for name, part in zip(SIZES, parts, strict=True)}
    step = step_of(partition, weights)
    return -np.concatenate([step[name].ravel() for name in SIZES])


def first() -> np.ndarray:
    return np.concatenate([INITIAL[name].ravel() for name in SIZES]).astype(np.float32)


@pytest.mark.parametrize("population", [12, 30])
def test_rounds_are_a_plain_poisson_draw_clip_sum_noise_and_division(tmp_path: Path, population: int) -> None:
    """Places that no node has come to stand at count as zero, and in the divisor."""
    result = train(tmp_path, population_size=population, min_available_nodes=12)
    weights, asked, clipped = first().astype(np.float64), 0, 0
    for number in range(3):
        rng = stream(5, "cohort", number)
        count = rng.binomial(population, 0.4)
        drawn = [place for place in rng.choice(population, size=count, replace=False, shuffle=False) if place < 12]
        total = np.zeros(16)
        for place in drawn:
            update = difference(place, weights.astype(np.float32))
            total += update * min(1, 1 / np.linalg.norm(update))
            clipped += np.linalg.norm(update) > 1
        StreamNoise(6, "noise", number).add_normal(total, 0.9)
        weights -= total / (0.4 * population)
        asked += len(drawn)
    assert 0 < clipped < asked
    assert np.allclose(values_of(result.arrays), weights, rtol=0, atol=1e-4)
    assert np.array_equal(result.arrays["batches"].numpy(), INITIAL["batches"])
    assert result.arrays["weight"].dtype == "float64"
    assert list(result.arrays) == list(INITIAL)


def test_rounds_are_bit_for_bit_the_rounds_of_the_house(tmp_path: Path) -> None:
    result = train(tmp_path / "strategy")
    plan = UlsPlan(**PLANNED)
    clip = Clip(norm=1.0)

    def gather(request: Work, costs: np.ndarray, **of_next_round: Any) -> Gathered:
        total = np.zeros(16, dtype=np.int64)
        for unit in request.units.tolist():
            update = clip.applied(difference(unit, request.parameters), SIZES)
            total += quantise(update, clip, SIZES, request.resolution)
        return Gathered(total=total, statistics={}, units=0, messages=0, failures=(), seconds=0, compute_seconds=0)

    ledger = Entries()
    optimizer = ServerOptimizer(first(), OptimizerConfig(name="sgd", learning_rate=1.0), 3)
    release = Release(plan, SIZES, 6, exact=True)
    users = Nodes(LocalGrid(node_app()), 12)
    ours = Round(plan, users, Seeds(sampling=5, noise=6), Budget(plan, ledger, 1e9), release, optimizer, exact=True)
    for number in range(3):
        ours.run(number, gather)
    assert np.array_equal(values_of(result.arrays), ours.parameters.astype(np.float64))
    assert [entry.event for entry in read_entries(tmp_path / "strategy" / "ledger.jsonl")] == ledger.events


class Entries:
    """A ledger in memory."""

    entries = ()

    def __init__(self) -> None:
        self.events: list[Any] = []

    def __len__(self) -> int:
        return len(self.events)

    def charge(self, event: Any, **more: Any) -> None:
        self.events.append(event)


def test_epsilon_is_the_accountants_and_is_confirmed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(tmp_path, rounds=4, epsilon=6, noise_multiplier=None)
    stated = json.loads((tmp_path / "privacy.json").read_text(encoding="utf-8"))
    plan = NodePlan(**{**PLANNED, "steps": 4}).calibrate(6)
    assert stated["epsilon"]["upper"] == plan.epsilon().upper <= 6
    assert stated["noise_multiplier"] == plan.noise_multiplier
    assert stated["steps"] == 4
    assert result.train_metrics_clientapp[4]["epsilon"] == stated["epsilon"]["upper"]
    assert stated["public_sizes"] == {"nodes": 12}
    assert set(plan.assumptions) <= set(stated["not_covered"])
    assert confirm_folder(tmp_path, (), as_json=False) == 0
    assert "second method" in capsys.readouterr().out


def test_it_stops_before_a_limit_is_exceeded(tmp_path: Path) -> None:
    limit = NodePlan(**PLANNED).epsilon(5).upper
    train(tmp_path, rounds=20, epsilon=limit)
    stated = json.loads((tmp_path / "privacy.json").read_text(encoding="utf-8"))
    assert stated["steps"] == 5
    assert stated["epsilon"]["upper"] <= limit


def test_noise_and_sampling_come_from_the_operating_system(tmp_path: Path) -> None:
    seeds: dict[str, Any] = {"sampling_seed": None, "noise_seed": None}
    runs = [values_of(train(tmp_path / name, **seeds).arrays) for name in "ab"]
    assert not np.isclose(*runs).any()
    words = (tmp_path / "a" / "privacy.json").read_text(encoding="utf-8")
    assert "Reproducible noise" not in words
    assert not (tmp_path / "a" / "secret.json").exists()
    train(tmp_path / "c")
    assert "Reproducible noise" in (tmp_path / "c" / "privacy.json").read_text(encoding="utf-8")


def test_a_round_of_nobody_is_noise_alone(tmp_path: Path) -> None:
    grid = StockGrid(node_app(), 12)
    result = train(tmp_path, grid, rounds=1, sampling_probability=1e-9)
    noise = np.zeros(16)
    StreamNoise(6, "noise", 0).add_normal(noise, 0.9)
    assert grid.asked == []
    assert np.allclose(values_of(result.arrays), first() - noise / 12e-9, rtol=1e-6)
    assert len(read_entries(tmp_path / "ledger.jsonl")) == 1


def test_a_torch_model_comes_back_as_one(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    model.register_buffer("scale", torch.tensor(2.0))
    app = ClientApp(mods=[user_level_clip_mod])

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        torch.manual_seed(context.node_id)
        own = copy.deepcopy(model)
        own.load_state_dict(message.content["arrays"].to_torch_state_dict())
        own(torch.randn(8, 3)).square().sum().backward()
        torch.optim.SGD(own.parameters(), lr=0.1).step()
        return Message(RecordDict({"arrays": ArrayRecord(own.state_dict())}), reply_to=message)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    strategy = UserLevelDP(**{**SETTINGS, "output": tmp_path, "rehearsal": True})
    result = strategy.start(LocalGrid(app, workers=12), ArrayRecord(model.state_dict()), num_rounds=2)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    for name, value in model.state_dict().items():
        moved = value.is_floating_point()
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]) != moved, name


def test_release_mode_writes_and_says_nothing_private(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"sampling_seed": None, "noise_seed": None, "sampling_probability": 1.0}
    for release in (False, True):
        caplog.clear()
        grid = StockGrid(node_app(), 12)
        grid.unreachable = {3}
        train(tmp_path / str(release), grid, release=release, **settings)
        lines = (tmp_path / str(release) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        private = [json.loads(line)["not_private"] for line in lines[1:]]
        expected = {"counted": 11.0, "clipped_units": private[0].get("clipped_units"), "late": 1.0, "units": 12.0}
        assert private == [{}] * 3 if release else private[0] == expected
        assert ("count as zero" in caplog.text) == (not release)
    for field in ({"noise_seed": 1}, {"sampling_seed": 1}, {"fraction_evaluate": 0.5}):
        with pytest.raises(InvalidInput, match="release=True"):
            train(tmp_path / "refused", release=True, **{**settings, **field})


def test_what_cannot_train_spends_nothing(tmp_path: Path) -> None:
    folder, rehearsed = tmp_path / "none", {"rehearsal": True}
    with pytest.raises(Failure, match="user_level_clip_mod"):
        train(folder, LocalGrid(node_app(mods=[]), workers=12), **rehearsed)
    with pytest.raises(Failure, match="2 nodes have come up"):
        train(folder, LocalGrid(node_app(), workers=2), timeout=0.1)
    with pytest.raises(InvalidInput, match="population_size is 12; it must be at least the 13 nodes"):
        train(folder, LocalGrid(node_app(), workers=13))
    for wrong, field in (
        ({"epsilon": None, "noise_multiplier": None}, "epsilon"),
        ({"epsilon": 1e-3}, "epsilon"),
        ({"noise_multiplier": 0}, "noise_multiplier"),
        ({"sampling_probability": 1.5}, "sampling_probability"),
        ({"clip_norm": 0}, "clip_norm"),
        ({"delta": 1}, "delta"),
        ({"population_size": 0}, "population_size"),
        ({"fraction_train": 0.5}, "UserLevelDP is 'fraction_train'"),
        ({"rounds": 0}, "num_rounds"),
        ({"server_learning_rate": -1}, "optimizer.learning-rate"),
    ):
        with pytest.raises(InvalidInput, match=field):
            train(folder, **wrong)
    assert not folder.exists()


def test_nodes_that_never_answer_end_the_run(tmp_path: Path) -> None:
    grid = StockGrid(node_app(mods=[]), 12)
    with pytest.raises(Failure, match="user_level_clip_mod"):
        train(tmp_path, grid, rounds=10)
    assert len(read_entries(tmp_path / "ledger.jsonl")) == 3


def test_a_rehearsal_changes_nothing(tmp_path: Path) -> None:
    with_one = train(tmp_path / "one", rehearsal=True)
    assert np.array_equal(values_of(with_one.arrays), values_of(train(tmp_path / "two").arrays))


def test_subclasses_may_set_the_configuration_and_see_what_is_released(tmp_path: Path) -> None:
    class Own(UserLevelDP):
        seen: list[float] = []  # noqa: RUF012

        def configure_train(
            self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
        ) -> Iterable[Message]:
            config["rate"] = 0.1 / server_round
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(
            self, server_round: int, replies: Iterable[Message]
        ) -> tuple[ArrayRecord | None, MetricRecord | None]:
            assert not list(replies)
            arrays, metrics = super().aggregate_train(server_round, replies)
            assert metrics is not None
            self.seen.append(float(metrics["epsilon"]))  # type: ignore[arg-type]
            return arrays, metrics

    grid = StockGrid(node_app(), 12)
    strategy = Own(**{**SETTINGS, "output": tmp_path, "fraction_evaluate": 1.0})
    result = strategy.start(grid, initial_arrays(), num_rounds=2)
    asked = [m.content["config"] for m in grid.asked if m.metadata.message_type == "train"]
    assert {(config["server-round"], config["rate"]) for config in asked} == {(1, 0.1), (2, 0.05)}
    assert strategy.seen == [result.train_metrics_clientapp[number]["epsilon"] for number in (1, 2)]
    assert result.evaluate_metrics_clientapp[2]["loss"] == pytest.approx(2.0)
    with pytest.raises(Failure, match="call start"):
        strategy.configure_train(3, initial_arrays(), ConfigRecord(), grid)
    with pytest.raises(Failure, match="call start"):
        UserLevelDP.aggregate_train(strategy, 3, grid.asked)


@pytest.mark.parametrize("nobody", [True, False])
def test_subclasses_may_not_choose_who_is_asked(tmp_path: Path, nobody: bool) -> None:
    class Choosing(UserLevelDP):
        def configure_train(self, *arguments: Any) -> Iterable[Message]:
            drawn = list(super().configure_train(*arguments))
            return drawn[1:] if nobody else drawn + drawn[:1]

    strategy = Choosing(**{**SETTINGS, "output": tmp_path / "run", "rehearsal": True})
    with pytest.raises(Failure, match="each node that was drawn, once"):
        strategy.start(LocalGrid(node_app(), workers=12), initial_arrays(), num_rounds=2)
    assert not (tmp_path / "run").exists()
