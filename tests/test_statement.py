"""The privacy statement says what the ledger holds and what was done, and no more: words against deeds."""

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np
import pytest

from experiments.audit.canaries import CanaryUsers
from experiments.audit.rig import FAR, OnlyRound, Rig
from fedsim.errors import InvalidInput
from fedsim.plan import ALGORITHMS, ElsPlan, Plan, UlsPlan
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import Adjacency, Composed, Event, Gaussian, Repeated, from_json
from fedsim.privacy.ledger import merged
from fedsim.privacy.mechanisms import MECHANISMS, GaussianNoise
from fedsim.sampling import SAMPLINGS, CyclicPoisson
from fedsim.statement import PrivacyStatement, privacy_statement

COMMON: dict[str, Any] = {
    "group_size": 4,
    "clip_norm": 2.0,
    "sampling_probability": 0.1,
    "noise_multiplier": 1.5,
    "steps": 3,
    "delta": 1e-5,
}
ULS = UlsPlan(num_users=3931, **COMMON)
ELS = ElsPlan(num_examples=3931, **COMMON)
SIZES = {"blocks.0.weight": 500, "blocks.1.weight": 3500}


def stated(plan: Plan, charged: Event | None = None, steps: int = 3, **more: Any) -> PrivacyStatement:
    event = plan.event() if charged is None else charged
    return privacy_statement(plan, event, sizes=SIZES, steps=steps, versions={"fedsim": "x"}, **more)


# ε is the ledger's --------------------------------------------------------------------------------------------------


def test_epsilon_is_that_of_the_ledger() -> None:
    step = ULS.step_event()
    statement = stated(ULS, Composed(events=(step, step, step)))
    assert statement.epsilon == epsilon_bounds(merged((step, step, step)), 1e-5)
    assert statement.steps == 3
    assert statement.private


def test_charges_without_a_release_count_as_steps() -> None:
    statement = stated(ULS, Repeated(event=ULS.step_event(), count=5))
    assert statement.steps == 5
    assert statement.epsilon == epsilon_bounds(merged([ULS.step_event()] * 5), 1e-5)


def test_a_release_without_a_charge_can_not_be_stated() -> None:
    with pytest.raises(InvalidInput, match="steps"):
        stated(ULS, Repeated(event=ULS.step_event(), count=2))


def test_json_holds_everything_and_survives_a_round_trip() -> None:
    statement = stated(ULS)
    values = statement.to_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["unit"] == "user"
    assert values["adjacency"] == "add-or-remove-one-user"
    assert values["epsilon"] == {"upper": statement.epsilon.upper, "lower": statement.epsilon.lower}
    assert (values["steps"], values["delta"], values["noise_multiplier"]) == (3, 1e-5, 1.5)
    assert values["sampling"]["probability"] == 0.1
    assert (values["contribution_bound"]["group_size"], values["contribution_bound"]["clip_norm"]) == (4, 2.0)
    assert "standard deviation 3 " in values["mechanism"]
    assert values["versions"] == {"fedsim": "x"}
    assert values["in_words"] == statement.in_words()
    assert from_json(values["event"]) == statement.event
    assert "3931" in values["not_covered"][0]


def test_the_paragraph_rounds_epsilon_outwards() -> None:
    statement = stated(ULS)
    words = statement.in_words()
    upper = float(words.split("ε = ")[1].split(",")[0])
    lower = float(words.split("is at least ")[1].split(" ")[0].rstrip("."))
    assert lower <= statement.epsilon.lower <= statement.epsilon.upper <= upper
    assert upper - statement.epsilon.upper < 2e-3 * upper
    assert "adding or removing one user" in words
    assert all(sentence in words for sentence in statement.not_covered)


def test_els_and_replacement_in_words() -> None:
    plan = dataclasses.replace(ELS, adjacency=Adjacency.REPLACE_ONE_USER)
    words = stated(plan, seeds_given=("noise",)).in_words()
    assert "replacing one user" in words
    assert "at most 4 of a user's examples in the whole run; each gradient is clipped to L2 norm 2;" in words
    assert "each kept example joins a step independently with probability 0.1" in words
    assert "noise seed was fixed" in words


def test_without_noise_it_plainly_says_so() -> None:
    statement = stated(dataclasses.replace(ULS, noise_multiplier=0.0, group_size=10**9), Composed(events=()))
    assert statement.epsilon.upper == math.inf
    assert not statement.private
    assert "NO privacy guarantee" in statement.in_words()
    assert "all of a user's examples" in statement.in_words()
    assert "no noise is added" in statement.in_words()
    values = statement.to_json()
    assert values["epsilon"] == {"upper": None, "lower": None}
    assert values["recompute"] is None
    json.dumps(values, allow_nan=False)


def test_nothing_released_is_epsilon_zero() -> None:
    plan = dataclasses.replace(ULS, noise_multiplier=0.0)
    assert stated(plan, Composed(events=()), steps=0).epsilon.upper == 0


def test_the_command_names_the_ledger_when_releases_differ() -> None:
    alike = stated(ULS).recompute
    assert alike is not None
    assert "--sampling-probability 0.1 --noise-multiplier 1.5 --steps 3 --delta 1e-05" in alike
    events = (*[ULS.step_event()] * 3, Gaussian(noise_multiplier=9.0))
    mixed = stated(ULS, Composed(events=events), ledger="a run/ledger.jsonl")
    assert mixed.recompute is not None
    assert "--ledger 'a run/ledger.jsonl'" in mixed.recompute
    assert "other kinds" in mixed.in_words()
    other = stated(dataclasses.replace(ULS, noise_multiplier=1.4), ULS.event())
    assert other.recompute is not None
    assert "--ledger" in other.recompute, "parameters that are not the ledger's would give another ε"


def test_a_mechanism_that_account_does_not_know_is_recomputed_from_the_ledger() -> None:
    laplace = dataclasses.replace(ULS, mechanism=MECHANISMS.build("randomised-laplace"))
    recompute = stated(laplace).recompute
    assert recompute is not None
    assert "--ledger ledger.jsonl" in recompute
    assert "other kinds" not in stated(laplace).in_words()


# Words against deeds ------------------------------------------------------------------------------------------------

NUMBER = r"(\d[\d.]*(?:e[+-]\d+)?)"


def numbers_after(pattern: str, text: str) -> list[float]:
    """Every number that stands where the pattern has its groups."""
    found = re.search(pattern.replace("#", NUMBER), text)
    assert found is not None, f"{pattern!r} is not in {text!r}"
    return [float(group) for group in found.groups()]


def plans() -> dict[str, Plan]:
    """Every mechanism × clip rule × sampling × algorithm that there is."""
    made: dict[str, Plan] = {}
    for algorithm, kind in ALGORITHMS.items():
        for mechanism, mechanism_kind in MECHANISMS.items():
            for sampling in SAMPLINGS:
                for quantile in (0.0, 0.5) if mechanism_kind.norm_order == 2 else (0.0,):
                    size = {"num_users": 40} if kind.redraws else {"num_examples": 80}
                    plan = kind(
                        group_size=2,
                        clip_norm=0.7,
                        noise_multiplier=1.3,
                        sampling_probability=0.25,
                        steps=12,
                        delta=1e-5,
                        mechanism=MECHANISMS.build(mechanism),
                        sampling=SAMPLINGS.build(sampling),
                        clip_quantile=quantile,
                        clip_count_std=1.5 if quantile else 0.0,
                        **size,
                    )
                    made[f"{algorithm}-{mechanism}-{sampling}-{'quantile' if quantile else 'fixed'}"] = plan
    return made


PLANS = plans()


def rig_for(plan: Plan, direction: np.ndarray, seed: int = 3) -> Rig:
    """Users that own two rows each, all with one gradient far beyond the clip."""
    users = CanaryUsers(np.full(40, 2), np.zeros(80))
    return Rig(plan, users, (FAR * direction[None]).astype(np.float32), sampling_seed=seed, noise_seed=seed + 1)


def noise_of(plan: Plan, width: int = 4000) -> tuple[np.ndarray, OnlyRound, Rig]:
    rig = rig_for(plan, np.zeros(width))
    round = rig.round(np.empty(0, dtype=np.int64))
    return rig.seen(round, 0).sum, round, rig


@pytest.mark.parametrize("name", PLANS)
def test_the_noise_that_is_drawn_is_the_noise_that_is_stated(name: str) -> None:
    plan = PLANS[name]
    words = stated(plan, steps=0).mechanism
    drawn, round, rig = noise_of(plan)
    by_parameter = np.split(drawn, np.cumsum(list(rig.sizes.values()))[:-1])
    assert list(rig.sizes) == list(SIZES)
    if not isinstance(round.release.noise, GaussianNoise):
        (scale,) = numbers_after("Laplace noise of scale # is added", words)
        assert np.abs(drawn).mean() == pytest.approx(scale, rel=0.06)
        return
    measured = [part.std() for part in by_parameter]
    (std,) = numbers_after("Gaussian noise of standard deviation # ", words)
    if "(so " in words:
        low, high = numbers_after(r"\(so # to #\)", words)
        assert (min(measured), max(measured)) == pytest.approx((low, high), rel=0.1)
        assert low < 0.9 * high
    else:
        assert measured == pytest.approx([std, std], rel=0.1)


@pytest.mark.parametrize("name", PLANS)
def test_the_clip_that_is_applied_is_the_clip_that_is_stated(name: str) -> None:
    plan = PLANS[name]
    silent = dataclasses.replace(plan, noise_multiplier=0.0, sampling_probability=1.0)
    words = stated(plan, steps=0).contribution_bound
    order, norm = numbers_after("clipped to L# norm #", words)
    direction = np.random.default_rng(1).standard_normal(24)
    rig = rig_for(silent, direction)
    units = 1 if plan.redraws else plan.group_size
    round = rig.round(np.arange(units))  # one user alone
    (put_in,) = [rig.seen(round, 0).sum]
    scales = np.ones(24)
    if "after division by a scale for each parameter" in words:
        clip = round.release.clip
        scales = np.repeat([clip.scales[one] for one in rig.sizes], list(rig.sizes.values()))
    assert np.linalg.norm(put_in / scales, order) == pytest.approx(units * norm, rel=1e-3)
    assert ("one update" in words) == plan.redraws
    assert ("each gradient" in words) == (not plan.redraws)
    assert f"at most {plan.group_size} of a user's examples" in words


@pytest.mark.parametrize("name", [name for name in PLANS if name.endswith("quantile")])
def test_a_moving_clip_norm_and_its_noised_count_are_stated(name: str) -> None:
    plan = PLANS[name]
    words = stated(plan, steps=0).mechanism
    start, quantile, rate = numbers_after(
        r"clip norm begins at # and follows the #-quantile of the units' norms \(learning rate #\)", words
    )
    (count_std,) = numbers_after(
        "releases a count of the units below it, with Gaussian noise of standard deviation #;", words
    )
    rig = rig_for(plan, np.zeros(8))
    counts = []
    for number in range(300):
        round = rig.round(np.empty(0, dtype=np.int64))
        moved = rig.seen(round, number).clip_norm
        # Nobody is there: what moves the norm is the noise of the count.
        counts.append((quantile - math.log(moved / start) / rate - 0.5) * plan.normaliser)
    assert np.std(counts) == pytest.approx(count_std, rel=0.15)
    assert start == plan.clip_norm


@pytest.mark.parametrize("name", [name for name in PLANS if name.endswith("fixed") and "gaussian" in name])
def test_units_are_sampled_as_stated(name: str) -> None:
    plan = PLANS[name]
    words = stated(plan, steps=0).to_json()["sampling"]["in_words"]
    (probability,) = numbers_after("independently with probability #", words)
    assert ("each user joins" in words) == plan.redraws
    joined = np.zeros(plan.population)
    for number in range(400):
        joined[plan.sample(number, 5)] += 1
    assert joined.mean() / 400 == pytest.approx(probability, rel=0.05)
    assert joined.max() < 400 * probability + 7 * math.sqrt(400 * probability)


@pytest.mark.parametrize("mechanism", ["banded", "layer-noise"])
@pytest.mark.parametrize("plan", [ULS, ELS], ids=["uls", "els"])
def test_correlated_noise_and_turns_are_what_the_words_say(plan: Plan, mechanism: str) -> None:
    size = {"num_users": 40} if plan.redraws else {"num_examples": 80}
    c = (1.0, 0.5, 0.25)
    plan = dataclasses.replace(plan, noise_coefficients=c, sampling=CyclicPoisson(groups=3), group_size=2, **size)
    plan = dataclasses.replace(plan, mechanism=MECHANISMS.build(mechanism))
    statement = stated(plan, steps=0)
    (std,) = numbers_after("Gaussian noise of standard deviation # ", statement.mechanism)
    strength, rounds = numbers_after("# times as strong as that and correlated over # rounds", statement.mechanism)
    assert numbers_after("fresh noise less #, # times", statement.mechanism) == [0.5, 0.25]
    assert rounds == 3
    rig = rig_for(plan, np.zeros(4000))
    round = rig.round(np.empty(0, dtype=np.int64))
    scales = np.repeat([round.release.clip.scales.get(one, 1.0) for one in rig.sizes], list(rig.sizes.values()))
    drawn = np.array([rig.seen(round, number).sum / scales for number in range(6)])
    fresh = np.array([sum(c[lag] * drawn[t - lag] for lag in range(min(3, t + 1))) for t in range(6)])
    assert fresh.std(axis=1) == pytest.approx(6 * [strength * std], rel=0.07)
    assert np.abs(np.corrcoef(fresh) - np.eye(6)).max() < 0.1
    assert np.corrcoef(drawn)[0, 1] < -0.3

    groups, in_turn = numbers_after(
        r"one of # groups for the whole run, .* independently with probability # \(cyclic", statement.in_words()
    )
    users = CanaryUsers(np.full(40, 2), np.zeros(80))
    population, joined = plan.population_of(users, 5), np.zeros((300, 40))
    for number in range(300):
        np.add.at(joined[number], population.users_of(plan.sample(number, 5, population=population)), 1)
    turns = [np.flatnonzero(joined[:, user]) % groups for user in range(40)]
    assert all(len(set(turn)) == 1 for turn in turns)
    assert joined.sum() / (300 / groups) / plan.population == pytest.approx(in_turn, rel=0.1)


def test_adaptive_scales_that_moved_are_what_the_words_say() -> None:
    plan = next(plan for name, plan in PLANS.items() if name == "uls-adaptive-noise-poisson-fixed")
    statement = stated(plan, steps=0)
    (equal,) = numbers_after("all equal in the first # rounds and then led by what earlier rounds released",
                             statement.contribution_bound)  # fmt: skip
    rig = rig_for(plan, np.ones(400))
    round = rig.round()
    round.parameters[:] = np.linspace(0.1, 1.0, 400)
    scales = []
    for number in range(6):
        scales.append(dict(round.release.clip.scales))
        rig.seen(round, number)
    assert [not at for at in scales] == [number < equal for number in range(6)]
    assert "times the round's scale of the parameter" in statement.mechanism


def test_what_was_made_of_the_releases_is_stated_and_changes_nothing_else() -> None:
    plain, averaged = stated(ULS), stated(ULS, post_processing=("The mean is exported.",))
    assert "3 steps. The mean is exported. What this does not cover" in averaged.in_words()
    assert (plain.to_json()["post_processing"], averaged.to_json()["post_processing"]) == (
        [],
        ["The mean is exported."],
    )
    assert averaged.in_words().replace(" The mean is exported.", "") == plain.in_words()
    own = {"in_words", "post_processing"}
    assert all(plain.to_json()[name] == value for name, value in averaged.to_json().items() if name not in own)
    free = stated(dataclasses.replace(ULS, noise_multiplier=0.0), Composed(events=()), post_processing=("A mean.",))
    assert "A mean." in free.in_words()


def test_local_steps_are_stated() -> None:
    plan = dataclasses.replace(ULS, local_steps=3, local_learning_rate=0.05)
    assert "one update of 3 local steps (learning rate 0.05) is clipped to L2 norm 2" in stated(plan).in_words()
