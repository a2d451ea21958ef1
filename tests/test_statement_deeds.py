"""What the privacy statement says was done, against what is done."""

import dataclasses
import math
import re

import numpy as np
import pytest
from stated import ELS, SIZES, ULS, stated

from experiments.audit.canaries import CanaryUsers
from experiments.audit.rig import FAR, OnlyRound, Rig
from fedsim.plan import ALGORITHMS, Plan
from fedsim.privacy.mechanisms import MECHANISMS, GaussianNoise
from fedsim.sampling import SAMPLINGS, CyclicPoisson

NUMBER = r"(\d[\d.]*(?:e[+-]\d+)?)"


def numbers_after(pattern: str, text: str) -> list[float]:
    """Every number that stands where the pattern has its groups."""
    found = re.search(pattern.replace("#", NUMBER), text)
    assert found is not None, f"{pattern!r} is not in {text!r}"
    return [float(group) for group in found.groups()]


CAPPED = [("uls", mechanism) for mechanism, kind in MECHANISMS.items() if kind.norm_order == 2]
"""What a hard cap on a round's units, and random allocation, go with."""


def plans() -> dict[str, Plan]:
    """Every mechanism × clip rule × sampling × algorithm that there is."""
    made: dict[str, Plan] = {}
    for algorithm, kind in ALGORITHMS.items():
        for mechanism, mechanism_kind in MECHANISMS.items():
            for sampling in SAMPLINGS:
                if sampling in ("truncated-poisson", "random-allocation") and (algorithm, mechanism) not in CAPPED:
                    continue  # refused: no event is known of both
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
SUMS = [name for name in PLANS if name.endswith("-poisson-fixed") and "cyclic" not in name and "trunc" not in name]
"""One of each algorithm and mechanism: clip and noise of a sum depend on nothing else."""
COUNTS = [name for name in PLANS if name.endswith("quantile") and "-gaussian-" in name]


def rig_for(plan: Plan, direction: np.ndarray, seed: int = 3) -> Rig:
    """Users that own two rows each, all with one gradient far beyond the clip."""
    users = CanaryUsers(np.full(40, 2), np.zeros(80))
    return Rig(plan, users, (FAR * direction[None]).astype(np.float32), sampling_seed=seed, noise_seed=seed + 1)


def noise_of(plan: Plan, width: int = 4000) -> tuple[np.ndarray, OnlyRound, Rig]:
    rig = rig_for(plan, np.zeros(width))
    round = rig.round(np.empty(0, dtype=np.int64))
    return rig.seen(round, 0).sum, round, rig


@pytest.mark.parametrize("name", SUMS)
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


@pytest.mark.parametrize("name", SUMS)
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


@pytest.mark.parametrize("name", COUNTS)
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
    if "random-allocation" in name:
        probability = 1 / numbers_after("exactly one of every # steps", words)[0]
    elif not plan.sampling.amplifies:
        probability = 1 / numbers_after("every user is in one of # groups", words)[0]
    else:
        (probability,) = numbers_after("independently with probability #", words)
    of_users = "each user joins" if plan.sampling.amplifies else "in its group's turn every user takes part"
    assert (of_users in words) == plan.redraws
    joined = np.zeros(plan.population)
    population = plan.population_of(CanaryUsers(np.full(40, 2), np.zeros(80)), 5)
    for number in range(400):
        joined[plan.sample(number, 5, population=population)] += 1
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
