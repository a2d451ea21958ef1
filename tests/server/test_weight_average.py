"""The average of the released weights: what numpy makes of them, beside a training that does not know of it."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mock_training import PARAMETERS, mock_clients, sum_of_units, training, uls_plan

from fedsim.config import OptimizerConfig
from fedsim.engine.messages import TrainRequest
from fedsim.optimizer import ServerOptimizer
from fedsim.privacy.events import Event
from server.evaluation import HeldOut, Measurement
from server.training import NothingTrained

ROUNDS = 10
AVERAGES: dict[str, dict[str, Any]] = {
    "exponential-0.5": {"average": "exponential", "average_decay": 0.5},
    "exponential-0.95": {"average": "exponential"},
    "tail-0.3": {"average": "tail", "average_share": 0.3},
    "tail-0.5": {"average": "tail"},
    "tail-1": {"average": "tail", "average_share": 1.0},
}


def weights_after_each_round(rounds: int = ROUNDS) -> np.ndarray:
    """Weights after each round without noise, float64 [rounds, P]: minus the cohorts' sums so far over qN = 10."""
    moves = np.zeros((rounds, PARAMETERS))
    for round in range(rounds):
        moves[round, uls_plan(steps=rounds).sample(round, 1)] = -1 / 10
    return np.cumsum(moves, axis=0)


def averaged(options: dict[str, Any], weights: np.ndarray, planned: int = ROUNDS) -> np.ndarray:
    """The average of weights [rounds, P] by its definition, in float64."""
    if options["average"] == "tail":
        first = planned - round(planned * options.get("average_share", 0.5))
        return np.asarray(weights[first:].mean(axis=0))
    powers = options.get("average_decay", 0.95) ** np.arange(len(weights))[::-1]
    return np.asarray(np.average(weights, axis=0, weights=powers))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, np.ndarray]]:
    """What is measured, in order: the split and the weights."""
    seen: list[tuple[str, np.ndarray]] = []

    def measure(self: HeldOut, split: str, parameters: np.ndarray) -> Measurement:
        seen.append((split, parameters.copy()))
        none = np.empty(0)
        return Measurement(loss=2.0, accuracy=0.5, perplexity=math.exp(2), user_losses=none, users=none)

    monkeypatch.setattr(HeldOut, "_measured", measure)
    return seen


@pytest.mark.parametrize("name", AVERAGES)
def test_it_is_what_numpy_makes_of_the_released_weights(tmp_path: Path, measured, name: str) -> None:
    plan, options = uls_plan(noise_multiplier=0.0, steps=ROUNDS), AVERAGES[name]
    run = training(tmp_path, plan, epsilon=math.inf, evaluate_every=1, **options)
    outcome = run.run()
    weights = weights_after_each_round()
    expected = averaged(options, weights)
    assert np.abs(expected - weights[-1]).max() > 0.01
    np.testing.assert_allclose(outcome.parameters, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(run.job.round.parameters, weights[-1], atol=1e-6)  # these go on as they were
    assert outcome.parameters.dtype == np.float32

    splits, models = zip(*measured, strict=True)
    assert splits == ("test", *["validation"] * (ROUNDS + 1), "test")
    assert not models[0].any()
    assert not models[1].any()
    assert np.array_equal(models[-1], outcome.parameters)
    lines = run.job.folder.read_metrics()
    for round, (model, line) in enumerate(zip(models[1:-1], lines, strict=True)):
        begun = round > ROUNDS - run.job.round.optimizer.average.count
        at_hand = weights[:round][-1] if round else np.zeros(PARAMETERS)
        np.testing.assert_allclose(
            model, averaged(options, weights[:round]) if begun else at_hand, rtol=1e-6, atol=1e-6
        )
        assert (line["weights"] == "last") == (not begun)


@pytest.mark.parametrize("name", AVERAGES)
def test_what_is_said_of_it_is_what_was_done(tmp_path: Path, name: str) -> None:
    run = training(tmp_path, uls_plan(noise_multiplier=0.0, steps=ROUNDS), epsilon=math.inf, **AVERAGES[name])
    outcome = run.run()
    (sentence,) = run.job.round.optimizer.average.in_words
    weights = weights_after_each_round()
    if said := re.search(r"mean of the weights after each of the last (\d+) rounds", sentence):
        expected = weights[-int(said[1]) :].mean(axis=0)
        assert outcome.weights == f"mean of the last {said[1]} rounds"
    else:
        said = re.search(
            r"exponential average \(decay ([\d.]+)\) of the weights after each of the (\d+) rounds", sentence
        )
        assert said is not None
        powers = float(said[1]) ** np.arange(int(said[2]))[::-1]
        expected = np.average(weights[-int(said[2]) :], axis=0, weights=powers)
        assert outcome.weights == f"exponential average (decay {said[1]})"
    assert "costs no privacy beyond" in sentence
    np.testing.assert_allclose(outcome.parameters, expected, rtol=1e-6, atol=1e-7)
    assert run.job.folder.read_metrics()[-1]["weights"] == outcome.weights


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_clients_ledger_and_weights_do_not_know_of_it(tmp_path: Path, rule: str) -> None:
    def run(options: dict[str, Any], folder: Path) -> tuple[list[bytes], list[tuple[int, Event]], float, np.ndarray]:
        asked: list[bytes] = []

        def total(request: TrainRequest) -> np.ndarray:
            asked.append(request.parameters.tobytes())
            return sum_of_units(request)

        made = training(folder, uls_plan(steps=5), clients=mock_clients(total), workers=1, name=rule, **options)
        outcome = made.run()
        assert outcome.rounds == 5
        charges = [(entry.round, entry.event) for entry in made.budget.ledger.entries]
        return asked, charges, outcome.epsilon, made.job.round.parameters.copy()

    asked, ledger, epsilon, weights = run({}, tmp_path / "none")
    assert len(set(asked)) == 5
    for name, options in AVERAGES.items():
        with_average = run(options, tmp_path / name)
        assert with_average[:3] == (asked, ledger, epsilon)
        assert np.array_equal(with_average[3], weights)


@pytest.mark.parametrize(("rounds", "over"), [(4, 0), (7, 2), (10, 5)])
def test_a_budget_that_ends_the_run_shortens_the_tail_or_leaves_the_last_weights(
    tmp_path: Path, rounds: int, over: int
) -> None:
    plan = uls_plan(steps=ROUNDS)
    limit = 1.0001 * plan.epsilon(rounds).upper
    run = training(tmp_path, plan, epsilon=limit, average="tail")
    seen: list[np.ndarray] = []
    step = run.job.round.optimizer.step

    def noted(mean: np.ndarray) -> None:
        step(mean)
        seen.append(run.job.round.parameters.astype(np.float64))

    run.job.round.optimizer.step = noted  # type: ignore[method-assign]
    outcome = run.run()
    assert outcome.rounds == rounds == len(seen)
    expected = np.mean(seen[-over:], axis=0) if over else seen[-1]
    np.testing.assert_allclose(outcome.parameters, expected, rtol=1e-6, atol=1e-6)
    assert outcome.weights == (f"mean of the last {over} rounds" if over else "last")
    assert len(run.job.round.optimizer.average.in_words) == (over > 0)
    if over:
        assert "no-average" not in run.alarms.sounded
    else:
        assert "ended after 4 rounds, and the average was to begin with round 6" in run.alarms.sounded["no-average"]


def test_nothing_is_missing_where_nothing_was_asked_for_or_trained(tmp_path: Path) -> None:
    plan = uls_plan(steps=ROUNDS)
    run = training(tmp_path / "none", plan, epsilon=100.0)
    outcome = run.run()
    assert "no-average" not in run.alarms.sounded
    assert outcome.weights == "last"
    assert np.array_equal(outcome.parameters, run.job.round.parameters)
    run = training(tmp_path / "tail", plan, epsilon=1e-3, average="tail")
    with pytest.raises(NothingTrained):
        run.run()
    assert "no-average" not in run.alarms.sounded


@pytest.mark.parametrize("name", ["none", *AVERAGES])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_it_goes_on_bit_for_bit_from_any_round(name: str, rule: str) -> None:
    config = OptimizerConfig(name=rule, **AVERAGES.get(name, {}))  # type: ignore[arg-type]
    means = np.random.default_rng(0).standard_normal((ROUNDS, 1001)).astype(np.float32)

    def begun() -> ServerOptimizer:
        return ServerOptimizer(np.ones(1001, dtype=np.float32), config, ROUNDS)

    whole = begun()
    for mean in means:
        whole.step(mean)
    for stop in range(ROUNDS + 1):
        first, second = begun(), begun()
        for mean in means[:stop]:
            first.step(mean)
        second.parameters[:] = first.parameters
        second.load_state({key: np.array(array) for key, array in first.state().items()})
        for mean in means[stop:]:
            second.step(mean)
        assert np.array_equal(second.result, whole.result)
        assert np.array_equal(second.parameters, whole.parameters)
        assert second.average.in_words == whole.average.in_words
    kept = {key for key, array in whole.state().items() if array.size == 1001}
    assert kept - {"exp_avg", "exp_avg_sq", "momentum_buffer"} == ({"average/values"} if name != "none" else set())


@pytest.mark.parametrize("average", ["exponential", "tail"])
def test_rounding_does_not_pile_up_over_many_rounds(average: Any) -> None:
    config = OptimizerConfig(
        name="sgd",
        learning_rate=1.0,
        average=average,
        **({"average_decay": 0.999} if average == "exponential" else {}),
    )
    rounds = 4000
    generator = np.random.default_rng(1)
    optimizer = ServerOptimizer(np.zeros(50, dtype=np.float32), config, rounds)
    weights = np.empty((rounds, 50))
    for round in range(rounds):
        optimizer.step(generator.standard_normal(50).astype(np.float32))
        weights[round] = optimizer.parameters
    options = {"average": average, "average_decay": config.average_decay}
    np.testing.assert_allclose(optimizer.result, averaged(options, weights, rounds), atol=1e-6 * np.abs(weights).max())
