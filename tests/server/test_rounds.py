"""The round loop, driven by mock clients whose updates are known."""

import dataclasses
import json
import math
import time

import numpy as np
import pytest
from mock_training import PARAMETERS, mock_clients, sum_of_units, training, uls_plan

from fedsim.engine.messages import TrainRequest
from fedsim.phases import Times
from fedsim.seeds import Seeds
from server.dispatch import RoundFailed


def released(parameters: np.ndarray) -> np.ndarray:
    """The mean that plain SGD at learning rate 1 subtracted from zero."""
    return -parameters


def test_without_noise_the_mean_is_the_sum_over_the_expected_cohort(tmp_path) -> None:
    plan = uls_plan(noise_multiplier=0.0, steps=4)
    run = training(tmp_path, plan, epsilon=math.inf)
    outcome = run.run()
    cohorts = [plan.sample(round, 1) for round in range(4)]
    expected = np.zeros(PARAMETERS)
    for cohort in cohorts:
        expected[cohort] += 1.0 / 10.0  # qN = 0.2 · 50, whatever the realised cohort
    assert {len(cohort) for cohort in cohorts} != {10}
    np.testing.assert_allclose(released(outcome.parameters), expected, atol=1e-6)
    assert math.isinf(outcome.epsilon)


def test_noise_has_the_planned_scale_and_is_fresh_each_round(tmp_path) -> None:
    plan = uls_plan(noise_multiplier=3.0, clip_norm=2.0, steps=1)
    silent = mock_clients(lambda request: np.zeros(PARAMETERS, dtype=np.float32))
    first = released(training(tmp_path / "a", plan, clients=silent).run().parameters)
    # σC/M = 3 · 2 / 10; the standard deviation of 20,000 draws is within 2 % of it.
    assert np.std(first) == pytest.approx(0.6, rel=0.02)
    assert abs(np.mean(first)) < 0.02

    two_rounds = released(
        training(tmp_path / "b", uls_plan(noise_multiplier=3.0, clip_norm=2.0, steps=2), clients=silent)
        .run()
        .parameters
    )
    second = two_rounds - first
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    other_seed = training(tmp_path / "c", plan, clients=silent, seeds=Seeds(sampling=1, noise=3)).run().parameters
    assert not np.allclose(first, released(other_seed))


def test_an_empty_cohort_still_releases_noise_and_is_charged(tmp_path) -> None:
    plan = uls_plan(sampling_probability=1e-9, steps=1)
    run = training(tmp_path, plan)
    outcome = run.run()
    assert len(plan.sample(0, 1)) == 0
    assert np.std(outcome.parameters) * plan.normaliser == pytest.approx(1.0, rel=0.02)
    assert len(run.budget.ledger) == 1


def test_the_run_stops_before_the_round_that_would_exceed_the_budget(tmp_path) -> None:
    plan = uls_plan(noise_multiplier=1.0, steps=20)
    limit = (plan.epsilon(4).upper + plan.epsilon(5).upper) / 2
    run = training(tmp_path, plan, epsilon=limit)
    outcome = run.run()
    assert outcome.rounds == 4
    assert len(run.budget.ledger) == 4
    assert outcome.epsilon == pytest.approx(plan.epsilon(4).upper, rel=1e-6)
    assert outcome.epsilon <= limit


def test_the_charge_is_on_disk_before_any_client_is_asked(tmp_path) -> None:
    charged = []

    def total(request: TrainRequest) -> np.ndarray:
        charged.append((tmp_path / "ledger.jsonl").read_text().count("poisson-subsampled-gaussian"))
        return sum_of_units(request)

    training(tmp_path, uls_plan(steps=3), clients=mock_clients(total), workers=1).run()
    assert charged == [1, 2, 3]


def test_a_client_that_fails_once_has_its_users_computed_elsewhere(tmp_path) -> None:
    failed = []

    def total(request: TrainRequest) -> np.ndarray:
        if request.round == 1 and not failed:
            failed.append(request.units)
            raise RuntimeError("worker lost")
        return sum_of_units(request)

    plan = uls_plan(noise_multiplier=0.0)
    with_failure = training(tmp_path / "a", plan, clients=mock_clients(total), epsilon=math.inf).run()
    without = training(tmp_path / "b", plan, epsilon=math.inf).run()
    assert len(failed) == 1
    np.testing.assert_allclose(with_failure.parameters, without.parameters, atol=1e-6)


def test_a_client_that_keeps_failing_ends_the_run_with_the_charge_kept(tmp_path) -> None:
    def total(request: TrainRequest) -> np.ndarray:
        raise RuntimeError("worker lost")

    run = training(tmp_path, uls_plan(), clients=mock_clients(total))
    with pytest.raises(RoundFailed, match="worker lost"):
        run.run()
    assert len(run.budget.ledger) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_a_sum_that_is_not_finite_or_too_long_is_never_released(tmp_path, bad: float) -> None:
    def total(request: TrainRequest) -> np.ndarray:
        values = sum_of_units(request)
        values[7] = bad
        return values

    run = training(tmp_path, uls_plan(), clients=mock_clients(total))
    with pytest.raises(RoundFailed):
        run.run()
    assert np.all(run.job.round.parameters == 0)


def test_one_user_a_message_gives_the_same_sum(tmp_path) -> None:
    plan = uls_plan(noise_multiplier=0.0)
    together = training(tmp_path / "a", plan, epsilon=math.inf).run().parameters
    alone = training(tmp_path / "b", plan, epsilon=math.inf, units_per_message=1)
    np.testing.assert_allclose(alone.run().parameters, together, atol=1e-6)


def test_metrics_name_what_is_not_private(tmp_path) -> None:
    run = training(tmp_path, uls_plan(steps=2))
    run.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert ["loss" in line for line in lines] == [True, False, True]
    assert lines[0]["epsilon"] == 0.0
    assert lines[2]["gradient_evaluations"] == pytest.approx(2 * 10 * 2)
    cohort = {"units", "train_loss", "clipped_fraction", "nonfinite_units", "norm_quantiles", "tokens"}
    took = {"tokens_per_second", "memory", "seconds", "phases"}
    assert set(lines[1]["not_private"]) == set(lines[2]["not_private"]) == cohort | took
    assert set(lines[0]["not_private"]) == {"memory", "seconds", "phases"}  # no round, no cohort
    assert not (cohort | took) & set(lines[1])


def test_a_rounds_line_is_of_its_own_cohort(tmp_path) -> None:
    """Norms of 1 + u and 8 tokens of each unit u, from two workers."""
    plan = uls_plan(steps=3)
    run = training(tmp_path, plan)
    run.run()
    lines = run.job.folder.read_metrics()
    for round, line in enumerate(lines[1:]):
        cohort, told = plan.sample(round, 1), line["not_private"]
        assert told["units"] == len(cohort)
        assert told["tokens"] == 8 * len(cohort)
        assert told["train_loss"] == pytest.approx(2 / len(cohort))  # of each worker 1
        assert told["norm_quantiles"] == pytest.approx(
            {f"{share:g}": np.quantile(1.0 + cohort, share) for share in (0.1, 0.25, 0.5, 0.75, 0.9)}
        )
        assert told["memory"]["worker_bytes"] == 1_000_000 + round  # the larger of two, not their sum
        assert told["memory"]["server_bytes"] > 50_000_000
    took = [line["not_private"]["tokens"] / line["not_private"]["tokens_per_second"] for line in lines[1:]]
    assert sum(took) == pytest.approx(lines[-1]["not_private"]["seconds"])


def test_of_an_empty_cohort_nothing_is_told(tmp_path) -> None:
    run = training(tmp_path, uls_plan(sampling_probability=1e-9, steps=1))
    run.run()
    assert set(run.job.folder.read_metrics()[1]["not_private"]) == {"memory", "seconds", "phases"}


def test_lines_of_metrics_tell_where_all_of_the_time_went(tmp_path, capsys) -> None:
    """Each since the one before; together all the time of the rounds, whatever measured it."""
    run = training(tmp_path, uls_plan(steps=5), evaluate_every=2)
    began = time.monotonic()
    run.run()
    took = time.monotonic() - began
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = [Times.from_json(line["not_private"]["phases"]) for line in lines]
    assert [times.rounds for times in told] == [0, 1, 1, 1, 1, 1]
    assert {"transport", "noise", "optimizer", "sampling", "charge", "evaluation", "other"} <= set(told[1].seconds)
    assert all(seconds >= 0 for times in told for seconds in times.seconds.values())
    assert [times.seconds["evaluation"] > 0 for times in told] == [True, False, True, False, True, True]
    whole = run.phases.so_far()
    assert 0 < sum(times.whole for times in told) <= whole.whole <= took
    assert sum(times.seconds.get("noise", 0) for times in told) == pytest.approx(whole.seconds["noise"])
    assert run.job.round.phases is run.phases
    assert f"ULS: {whole.of_rounds(5).in_words()} (Not private: " in " ".join(capsys.readouterr().err.split())


def test_without_metrics_of_training_users_no_time_is_told(tmp_path, capsys) -> None:
    """How long gradients take tells how much text was drawn."""
    run = training(tmp_path, uls_plan(steps=2))
    run.job = dataclasses.replace(run.job, training_metrics=False)
    run.run()
    assert "seconds" not in (tmp_path / "metrics.jsonl").read_text()
    assert "A round took" not in capsys.readouterr().err


def test_times_go_on_where_a_checkpoint_was(tmp_path) -> None:
    run = training(tmp_path / "a", uls_plan(steps=2))
    run.run()
    kept = run.state()
    again = training(tmp_path / "b", uls_plan(steps=2))
    for number in range(2):
        again.budget.charge(number)
    again.load_state(kept)
    before, now = Times.from_json(kept.values["phases"]), again.phases.so_far()
    assert before.rounds == 2
    assert now.of_rounds(2) == before
    earlier = dataclasses.replace(kept, values={k: v for k, v in kept.values.items() if not k.startswith("phases")})
    again.load_state(earlier)  # of a version that told of none
