"""Truncated Poisson sampling as a scheme: who is drawn, what it is divided by, what is said and charged."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from small_flags import LOCAL, SMALL

from experiments.run import main
from fedsim.config import PlanConfig
from fedsim.errors import InvalidInput
from fedsim.plan import Plan, UlsPlan, plan_from_json
from fedsim.planner import UserSizes
from fedsim.privacy.events import TruncatedPoissonSubsampledGaussian
from fedsim.sampling import SAMPLINGS, TruncatedPoisson


def plan(cap: int, users: int = 40, probability: float = 0.25, **changes: Any) -> UlsPlan:
    return UlsPlan(
        num_users=users, group_size=2, sampling_probability=probability, clip_norm=1.0, noise_multiplier=1.5, steps=7,
        delta=1e-5, sampling=TruncatedPoisson(most_units=cap), **changes,
    )  # fmt: skip


def drawn(cap: int, rounds: int, users: int = 40, probability: float = 0.25) -> list[np.ndarray]:
    capped = plan(cap, users, probability)
    return [capped.sample(number, seed=5) for number in range(rounds)]


@pytest.mark.parametrize("cap", [1, 8, 12, 30])
def test_rounds_are_binomial_up_to_the_cap_and_never_above(cap: int) -> None:
    sizes, rounds = np.array([len(units) for units in drawn(cap, 3000)]), 3000
    assert sizes.max() <= cap
    for size in range(cap + 1):
        share = stats.binom.pmf(size, 40, 0.25) if size < cap else stats.binom.sf(cap - 1, 40, 0.25)
        assert (sizes == size).mean() == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / rounds) + 1e-3)


@pytest.mark.parametrize("cap", [1, 8, 12, 30])
def test_every_unit_and_every_pair_of_units_is_drawn_as_often(cap: int) -> None:
    rounds = 6000
    held = np.zeros((rounds, 10))
    for number, units in enumerate(drawn(cap, rounds, users=10, probability=0.6)):
        held[number, units] = 1
    sizes = np.minimum(np.arange(11), cap)
    masses = stats.binom.pmf(np.arange(11), 10, 0.6)
    one, two = masses @ sizes / 10, masses @ (sizes * (sizes - 1)) / 90
    together = held.T @ held / rounds
    assert np.diag(together) == pytest.approx(one, abs=5 * math.sqrt(one * (1 - one) / rounds))
    apart = together[np.triu_indices(10, 1)]
    assert apart == pytest.approx(two, abs=5 * math.sqrt(two * (1 - two) / rounds) + 1e-12)


def test_a_plan_divides_by_what_is_expected_and_charges_what_is_drawn() -> None:
    capped = plan(8)
    expected = stats.binom.pmf(np.arange(41), 40, 0.25) @ np.minimum(np.arange(41), 8)
    assert capped.normaliser == pytest.approx(expected, rel=1e-12)
    assert capped.step_event() == TruncatedPoissonSubsampledGaussian(
        sampling_probability=0.25, population_size=40, most_units=8, noise_multiplier=1.5
    )
    assert "of more than 8 that join 8 are kept" in capped.sampling_in_words
    assert plan_from_json(capped.to_json()) == capped
    assert plan(40).normaliser == 10.0, "a cap that nothing reaches leaves the divisor alone"


@pytest.mark.parametrize(("users", "probability"), [(1, 1.0), (40, 0.25), (5, 1e-9), (340_000, 1 / 340), (10**7, 0.3)])
def test_the_cap_chosen_where_none_is_given_is_the_least_that_is_hardly_ever_exceeded(
    users: int, probability: float
) -> None:
    chosen = plan(0, users, probability)
    cap = chosen.step_event().most_units  # type: ignore[attr-defined]
    assert 1 <= cap <= users
    assert stats.binom.sf(cap, users, probability) <= 1e-15
    assert cap == 1 or stats.binom.sf(cap - 1, users, probability) > 0.99e-15
    assert chosen.normaliser == pytest.approx(users * probability, rel=1e-12)
    assert f"of more than {cap} " in chosen.sampling_in_words


def test_options_are_read_and_wrong_ones_refused() -> None:
    assert SAMPLINGS.build("truncated-poisson", ("most-units=12",)) == TruncatedPoisson(most_units=12)
    for wrong in ("most-units=-1", "most-units=2.5", "cap=3"):
        with pytest.raises(InvalidInput):
            SAMPLINGS.build("truncated-poisson", (wrong,))


def planned(**changes: Any) -> Plan:
    config = PlanConfig(sampling="truncated-poisson", gradients_per_round=25, noise_multiplier=2.0, **changes)
    return config.for_users(UserSizes.of_quantiles(90, {0.5: 8}))


def test_groups_have_no_event() -> None:
    assert isinstance(planned(), UlsPlan)
    with pytest.raises(InvalidInput, match="poisson with els"):
        planned(algorithm="els")


@pytest.mark.parametrize("cap", [0, 8, 11])
def test_the_options_of_account_find_the_same_epsilon(cap: int, capsys: pytest.CaptureFixture[str]) -> None:
    capped = plan(cap)
    options = capped.sampling.account_options(40, 0.25)
    assert options is not None
    words = ["--noise-multiplier", "1.5"] + [word for name, value in options.items() for word in (f"--{name}", value)]
    assert main(["account", *words, "--steps", "7", "--delta", "1e-5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["epsilon"]
    assert (found["lower"], found["upper"]) == (capped.epsilon().lower, capped.epsilon().upper)


def account(arguments: str) -> int:
    return main(["account", *shlex.split(arguments)])


CAPPED = "--sampling truncated-poisson --population-size 1000 --most-units 60 --steps 50 --delta 1e-6"


@pytest.mark.parametrize(
    "left_out",
    ["--sampling-probability 0.05", "--noise-multiplier 2", "--noise-multiplier 2 --sampling-probability 0.05"],
)
def test_account_finds_what_is_left_out(left_out: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = CAPPED.replace("--steps 50", "") if len(left_out) > 40 else CAPPED
    assert account(f"{words} {left_out} --target-epsilon 2 --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert 1.9 < found["epsilon"]["upper"] <= 2
    assert (found["most_units"], found["population_size"], found["sampling"]) == (60, 1000, "truncated-poisson")


def test_account_says_what_is_missing_and_what_does_not_belong(capsys: pytest.CaptureFixture[str]) -> None:
    noise = "--noise-multiplier 2 --sampling-probability 0.05"
    for arguments, said in [
        (f"{CAPPED.replace('--most-units 60', '')} {noise}", "--most-units"),
        (f"{CAPPED.replace('--population-size 1000', '')} {noise}", "--population-size"),
        (f"{CAPPED} {noise} --cohort-size 3", "cohort-size"),
        (f"{noise} --steps 5 --most-units 60", "most-units"),
        (f"{CAPPED} {noise} --algorithm els --group-size 2", "sampling"),
        (f"{CAPPED.replace('60', '0')} {noise}", "most-units"),
    ]:
        assert account(arguments) == 2
        caught = capsys.readouterr()
        assert said in caught.out + caught.err


def test_in_words_account_names_the_cap(capsys: pytest.CaptureFixture[str]) -> None:
    many = CAPPED.replace("1000", "1234567")
    assert account(f"{many} --noise-multiplier 2 --sampling-probability 0.05") == 0
    said = capsys.readouterr().out
    assert "population-size 1234567" in said
    assert "most-units 60" in said


def test_a_run_states_its_cap_and_the_second_method_confirms_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capped = ["--plan.sampling", "truncated-poisson", "--plan.sampling-options", "most-units=66"]
    folder = str(tmp_path / "run")
    assert main(["train", *SMALL, *LOCAL, *capped, "--plan.rounds", "2", "--output", folder]) == 0
    stated = json.loads((tmp_path / "run" / "privacy.json").read_text(encoding="utf-8"))
    assert "of more than 66 that join 66 are kept" in stated["in_words"]
    capsys.readouterr()
    assert main(["account", "--check", folder]) == 0
    assert "confirmed: ε ≤" in capsys.readouterr().out
    assert main(shlex.split(stated["recompute"])[3:]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] == stated["epsilon"]
