"""Participation without sampling: who takes part when, what all rounds tell together, and what is said of it."""

import dataclasses
import json
import shlex
from typing import Any

import numpy as np
import pytest

from experiments.audit.canaries import CanaryUsers
from experiments.run import main
from fedsim.config import NoiseConfig, PlanConfig, RunConfig
from fedsim.errors import InvalidInput
from fedsim.plan import ElsPlan, Plan, UlsPlan, UserSizes, plan_from_json, plan_from_values
from fedsim.plan.correlation import Correlation
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import Adjacency
from fedsim.privacy.gaussian_curve import gaussian_epsilon
from fedsim.privacy.ledger import merged
from fedsim.privacy.mechanisms import MECHANISMS
from fedsim.privacy.mechanisms.banded.blt import BufferedToeplitz
from fedsim.privacy.mechanisms.banded.coefficients import norm_above
from fedsim.privacy.mechanisms.banded.workload import Workload
from fedsim.release import Release
from fedsim.sampling import CyclicPoisson, Poisson, RandomAllocation, Sampling, Turns
from fedsim.statement import KNOWN_SAMPLING, KNOWN_TURNS, PSEUDO_RANDOM_SAMPLING, privacy_statement

ROUNDS = 6
BUFFERS = ((0.2, 0.5), (0.25, 0.9))
COMMON: dict[str, Any] = {
    "clip_norm": 0.5,
    "noise_multiplier": 1.3,
    "steps": ROUNDS,
    "delta": 1e-5,
    "sampling": Turns(),
}


def uls(groups: float = 2, users: int = 2, **changes: Any) -> UlsPlan:
    return UlsPlan(**{**COMMON, "num_users": users, "group_size": 1, "sampling_probability": 1 / groups, **changes})


def els(groups: float = 2, users: int = 2, **changes: Any) -> ElsPlan:
    size = {"num_examples": 2 * users, "group_size": 2}
    return ElsPlan(**{**COMMON, **size, "sampling_probability": 1 / groups, **changes})


def owners(users: int, rows: int = 2) -> CanaryUsers:
    return CanaryUsers(np.full(users, rows), np.zeros(rows * users))


def took_part(plan: Plan, users: int, rounds: int, seed: int = 3, attempt: int = 0) -> np.ndarray:
    """Units of each user in each round, [rounds, users]."""
    population = plan.population_of(owners(users), seed)
    counts = np.zeros((rounds, users))
    for round in range(rounds):
        units = plan.sample(round, seed, attempt, population)
        np.add.at(counts[round], population.users_of(units), 1)
    return counts


# Who takes part when ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [uls, els])
def test_everybody_takes_part_in_one_round_of_each_cycle_with_all_there_is(make) -> None:
    plan = make(3.7, users=300)
    counts = took_part(plan, 300, 9)
    whole = 1 if plan.redraws else 2
    assert set(np.unique(counts)) == {0, whole}
    assert (counts[:3].sum(axis=0) == whole).all()
    np.testing.assert_array_equal(counts[:3], counts[3:6])
    # Uniform: 100 users a group, standard deviation 8.2.
    assert np.abs(counts[:3].sum(axis=1) / whole - 100).max() < 5 * 8.2
    assert plan.normaliser == pytest.approx(counts.sum(axis=1)[:3].mean())
    np.testing.assert_array_equal(counts, took_part(plan, 300, 9, attempt=2))
    assert (counts != took_part(plan, 300, 9, seed=4)).any()


@pytest.mark.parametrize("sampling", [Turns(), CyclicPoisson(groups=3), Poisson(), RandomAllocation()])
def test_a_run_is_accounted_as_what_its_rounds_are_charged(sampling: Sampling) -> None:
    plan = uls(3.7, users=300, sampling=sampling, sampling_probability=0.9 / 4)
    for rounds in range(1, 10):
        charged = merged(plan.charge(round) for round in range(rounds))
        together = epsilon_bounds(charged, plan.delta)
        assert epsilon_bounds(plan.event(rounds), plan.delta).upper == pytest.approx(together.upper, rel=1e-3)


@pytest.mark.parametrize("make", [uls, els])
@pytest.mark.parametrize("sampling", [Turns(), CyclicPoisson(groups=3), CyclicPoisson(groups=4)])
def test_a_user_keeps_its_turn_whatever_runs_again(sampling: Sampling, make) -> None:
    plan = make(3.7, users=300, sampling=sampling, sampling_probability=0.9 / 4)
    apart = plan.scheme.separation
    there = sum(took_part(plan, 300, 3 * apart, attempt=attempt) for attempt in range(4)) > 0
    by_turn = np.stack([there[turn::apart].any(axis=0) for turn in range(apart)])
    assert (by_turn.sum(axis=0) == 1).all()


@pytest.mark.parametrize(
    ("probability", "groups"), [(1.0, 1), (0.51, 1), (0.5, 2), (1 / 3, 3), (0.3, 3), (1 / 49, 49), (128 / 14302, 111)]
)
def test_as_many_groups_take_turns_as_leave_a_round_what_was_asked_for(probability: float, groups: int) -> None:
    plan = uls(1 / probability, users=14302)
    assert (plan.scheme.separation, plan.normaliser) == (groups, 14302 / groups)
    assert plan.normaliser >= probability * 14302 * (1 - 1e-9)


# What all rounds tell together --------------------------------------------------------------------------------------


class Unit:
    """A source whose draw of the n-th round is 1 in the n-th value, and 0 in the others."""

    def __init__(self, number: int) -> None:
        self.number = number

    def add_normal(self, total: np.ndarray, std: float) -> None:
        total[self.number] += std


def noise_of(plan: Plan, monkeypatch: pytest.MonkeyPatch, chains: tuple[range, ...]) -> np.ndarray:
    """The noise of each release as it is made of fresh noise: standard deviations in clip norms, [releases, fresh]."""
    releases = [(round, attempt) for attempt, rounds in enumerate(chains) for round in rounds]
    release = Release(plan, {"all": len(releases)}, 1, exact=True)
    parts = []
    for number, (round, attempt) in enumerate(releases):
        monkeypatch.setattr(release, "_source", lambda *_, number=number: Unit(number))
        if round == chains[attempt].start:
            release.begin_chain(round, attempt)
        mean = release.noised_mean(np.zeros(len(releases)), release.clip, round, attempt=attempt)
        parts.append(mean * plan.normaliser / plan.clip_norm)
    return np.array(parts)


def worst_excess(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, chains: tuple[range, ...] = (range(ROUNDS),)
) -> tuple[float, float]:
    """Exact ε of what releases tell about either of two users, less what they were charged as, and less than that.

    Exactly: the Gaussian with the releases' covariance, at a user whose updates are all alike and as long as clips
    permit; of every beginning of the releases, the worst first, then the least bad of the whole.
    """
    noise = noise_of(plan, monkeypatch, chains)
    rounds = [round for chain in chains for round in chain]
    excess = []
    for seed in range(6):
        counts = took_part(plan, 2, ROUNDS, seed)[rounds]
        for end in range(1, len(rounds) + 1):
            charged = merged(plan.charge(round) for round in rounds[:end])
            # One group alone may have gone through most charges: whoever is in it is compared.
            shifts = [np.linalg.norm(np.linalg.solve(noise[:end, :end], counts[:end, user])) for user in range(2)]
            upper = epsilon_bounds(charged, plan.delta).upper
            excess.append(max(gaussian_epsilon(float(shift), plan.delta).lower for shift in shifts) - upper)
    whole = excess[len(rounds) - 1 :: len(rounds)]
    return max(excess), max(whole)


CHAINS = {"whole": (range(ROUNDS),), "begun again": (range(4), range(3, ROUNDS))}


@pytest.mark.parametrize("chains", CHAINS)
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("make", [uls, els])
def test_releases_together_tell_what_they_are_charged_as_and_no_more(
    make, groups: int, chains: str, monkeypatch
) -> None:
    bands = tuple(1 - 0.4 * lag for lag in range(groups))
    for changes in ({}, {"noise_coefficients": bands}, {"noise_buffers": BUFFERS}):
        most, whole = worst_excess(make(groups, **changes), monkeypatch, CHAINS[chains])
        assert most <= 0
        if chains == "whole" or not changes:  # a chain that ends early tells less
            assert whole > -0.01


@pytest.mark.parametrize("steps", [5, 7, 9])
def test_where_turns_do_not_come_out_even_buffers_are_charged_as_if_they_did(steps: int, monkeypatch) -> None:
    plan = uls(4, steps=steps, noise_buffers=BUFFERS)
    assert worst_excess(plan, monkeypatch, (range(min(steps, ROUNDS)),))[0] <= 0


def test_noise_that_forgets_that_users_come_back_is_found_out(monkeypatch) -> None:
    plan = uls(2, noise_buffers=BUFFERS)
    noise = BufferedToeplitz.of_pairs(BUFFERS)
    once = Correlation((1.0,), noise, norm_above(noise.coefficients(ROUNDS)))
    assert worst_excess(plan, monkeypatch)[0] <= 0
    with monkeypatch.context() as patched:
        patched.setattr(UlsPlan, "correlation", once)
        assert worst_excess(plan, patched)[0] > 0.1
    longer = uls(2)
    object.__setattr__(longer, "noise_coefficients", (1.0, 0.6, 0.4))
    assert worst_excess(longer, monkeypatch)[0] > 0.1


def test_a_run_is_as_many_gaussian_releases_as_a_user_has_turns() -> None:
    plan = uls(111, users=14302, steps=200, noise_buffers=BUFFERS)
    assert plan.epsilon().upper == pytest.approx(gaussian_epsilon(2**0.5 / 1.3, 1e-5).upper, rel=1e-6)
    charged = merged(plan.charge(round) for round in range(200))
    assert epsilon_bounds(charged, 1e-5).upper == pytest.approx(plan.epsilon().upper, rel=1e-9)
    example = els(4, users=8, steps=8)
    assert example.epsilon().upper == pytest.approx(gaussian_epsilon(2 * 2**0.5 / 1.3, 1e-5).upper, rel=1e-3)


# What is said of it -------------------------------------------------------------------------------------------------


def stated(plan: Plan, **more: Any):
    sizes = {"a": 3000, "b": 1000}
    charged = merged(plan.charge(round) for round in range(plan.steps))
    return privacy_statement(plan, charged, sizes=sizes, steps=plan.steps, versions={}, **more)


def test_no_secret_is_claimed_and_none_is_said_to_be_missing() -> None:
    turns, sampled = uls(3, users=30), uls(3, users=30, sampling=Poisson())
    words = stated(turns).to_json()["sampling"]["in_words"]
    assert "one of 3 groups" in words
    assert "no amplification is claimed, and who takes part when may be known" in words
    known = {plan: stated(plan, seeds_given=("sampling",)).not_covered for plan in (turns, sampled)}
    both = {KNOWN_TURNS, KNOWN_SAMPLING}
    assert both & set(known[turns]) == {KNOWN_TURNS}
    assert both & set(known[sampled]) == {KNOWN_SAMPLING}
    for origin in ("secure", "secure-exact"):
        assert PSEUDO_RANDOM_SAMPLING not in stated(turns, noise_origin=origin).not_covered
        assert PSEUDO_RANDOM_SAMPLING in stated(sampled, noise_origin=origin).not_covered


def test_turns_that_cost_less_than_they_are_charged_are_not_said_to_be_exact() -> None:
    assert "as far as it is accounted for here" not in stated(uls(1, 30)).in_words()
    assert "as far as it is accounted for here" in stated(uls(1, 30, noise_buffers=BUFFERS)).in_words()


@pytest.mark.parametrize("plan", [uls(3, 30), els(3, 30), uls(1, 30), uls(3, 30, noise_buffers=BUFFERS)])
def test_the_command_that_is_named_finds_the_same_epsilon(plan: Plan, capsys) -> None:
    statement = stated(plan)
    assert statement.recompute is not None
    assert "--sampling none --groups" in statement.recompute
    assert main(shlex.split(statement.recompute)[3:]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"]["upper"] == pytest.approx(statement.epsilon.upper, rel=1e-9)


def test_buffers_are_stated_as_they_are_applied() -> None:
    plan = uls(3, 30, noise_buffers=BUFFERS)
    values = stated(plan).to_json()
    assert values["noise_buffers"] == [list(map(pytest.approx, pair)) for pair in BUFFERS]
    assert plan.correlation is not None
    norm = plan.correlation.norm
    words = values["mechanism"]
    assert f", {norm:.4g} times as strong as that and correlated over all rounds through buffers" in words
    assert "fresh noise less 0.2, 0.25 times the buffers, which are then 0.5, 0.9 times what they were" in words
    release = Release(plan, {"all": 40_000}, 5)
    rows = [release.noised_mean(np.zeros(40_000, dtype=np.float32), release.clip, round) for round in range(2)]
    first, second = (row * plan.normaliser / (plan.noise_multiplier * plan.clip_norm * norm) for row in rows)
    assert first.std() == pytest.approx(1, rel=0.02)
    assert np.mean(first * second) == pytest.approx(-0.45, abs=0.03)


# Configurations -----------------------------------------------------------------------------------------------------

SIZES = UserSizes(num_users=14302, sizes=np.array([4]), source="a test", private=False)
CONFIG = PlanConfig(gradients_per_round=128, rounds=200, sampling="none")


def test_bands_found_for_turns_leave_turns_as_they_are() -> None:
    plan = dataclasses.replace(CONFIG, bands="auto").for_users(SIZES)
    assert plan.scheme == Turns(groups=111)
    assert 32 <= plan.bands <= 111
    plain = CONFIG.for_users(SIZES)
    assert plan.noise_multiplier == pytest.approx(plain.noise_multiplier, rel=1e-3), "bands cost nothing"


def test_more_bands_than_groups_are_refused_and_do_not_make_users_be_sampled() -> None:
    with pytest.raises(InvalidInput, match=r"plan\.bands is 112; it must be at most 111 with none"):
        dataclasses.replace(CONFIG, bands="112", noise_multiplier=1.0).for_users(SIZES)


def test_one_buffer_leaves_about_as_little_noise_as_many_bands() -> None:
    workload = Workload.prefix_sums(200)
    plan = dataclasses.replace(CONFIG, buffers=1).for_users(SIZES, workload)
    correlation = plan.correlation
    assert correlation is not None
    assert correlation.buffered is not None
    c = correlation.buffered.coefficients(200)
    left = correlation.norm * workload.error(c) / np.linalg.norm(c) / workload.error((1.0,))
    assert left < 0.28
    assert plan_from_json(plan.to_json()) == plan
    old = {name: value for name, value in uls(3, 30).to_values().items() if name != "noise_buffers"}
    assert plan_from_values(old) == uls(3, 30)


@pytest.mark.parametrize("sampling", [Poisson(), CyclicPoisson(groups=2)])
def test_buffers_are_refused_where_sampling_amplifies(sampling) -> None:
    with pytest.raises(InvalidInput, match=r"plan\.buffers is 2; it must be 0 with .*poisson"):
        uls(2, sampling=sampling, noise_buffers=BUFFERS)
    with pytest.raises(InvalidInput, match=r"plan\.buffers"):
        PlanConfig(sampling=sampling.name, buffers=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_coefficients": (1.0, 0.5), "noise_buffers": BUFFERS},
        {"noise_buffers": BUFFERS, "mechanism": MECHANISMS.build("randomised-laplace")},
        {"noise_buffers": ((0.9, 0.5),)},
        {"noise_coefficients": (1.0, 0.5, 0.2)},
        {"sampling": Turns(groups=3)},
        {"adjacency": Adjacency.REPLACE_ONE_USER},
    ],
)
def test_plans_without_a_proof_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        uls(2, **changes).event()


@pytest.mark.parametrize(
    "changes",
    [{"buffers": 9}, {"buffers": -1}, {"buffers": 1, "bands": "2"}, {"buffers": 1, "bands": "auto"}],
)
def test_options_that_do_not_go_together_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"plan\.buffers"):
        dataclasses.replace(CONFIG, **changes)


def test_secure_noise_has_no_buffers() -> None:
    with pytest.raises(InvalidInput, match=r"plan\.buffers"):
        RunConfig(plan=dataclasses.replace(CONFIG, buffers=1), noise=NoiseConfig(secure=True))
    with pytest.raises(InvalidInput, match=r"plan\.buffers"):
        Release(uls(2, noise_buffers=BUFFERS), {"all": 4}, None)
