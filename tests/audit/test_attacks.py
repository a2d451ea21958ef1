"""The attacks' two worlds differ by one user, their scores are the best there are, and they come near the claim."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from experiments.audit.attacks import (
    CANARY,
    always_sampled,
    many_runs,
    of_the_count,
    of_the_sum,
    one_run,
    one_run_scores,
    units_of,
    users_of,
    worst_canary,
)
from experiments.audit.canaries import CanaryUsers
from experiments.audit.chains import fresh, one_turn, over_turns, strength
from experiments.audit.rig import Rig, state_of
from experiments.audit.turns import turns
from fedsim.clip import Clip, ClipBlock
from fedsim.config import PlanConfig
from fedsim.plan import ElsPlan, Plan, UlsPlan
from fedsim.planner import UserSizes
from fedsim.privacy.audit.claim import epsilon_free
from fedsim.privacy.audit.rates import attack_rates
from fedsim.privacy.mechanisms import GaussianNoise, RandomisedLaplace
from fedsim.privacy.mechanisms.banded.filter import FloatFilter
from fedsim.privacy.mechanisms.laplace.mechanism import LaplaceNoise
from fedsim.privacy.mechanisms.laplace.scalar import privacy_loss, pure_epsilon, sample_noise

NOISE_SHARP_AT_ZERO = (("uniform", 0.994, 0.24, 0.36), ("uniform", 0.006, 48.0, 72.0))
"""A law whose noise hides one number well and 1,000 small ones badly."""


def uls(**changes: Any) -> UlsPlan:
    values: dict[str, Any] = {
        "num_users": 2,
        "sampling_probability": 1.0,
        "group_size": 1,
        "clip_norm": 0.5,
        "noise_multiplier": 1.0813,
        "steps": 1,
        "delta": 1e-5,
    }
    return UlsPlan(**values | changes)


def planned(**changes: Any) -> Plan:
    config = PlanConfig(**{"gradients_per_round": 30, "group_size": 3, "rounds": 2, "epsilon": 4.0} | changes)
    return config.for_users(UserSizes.of_quantiles(40, {0.5: config.examples_per_user}))


PLANS = [
    {"algorithm": algorithm, "mechanism": mechanism, "clip_quantile": quantile}
    for algorithm in ("uls", "els")
    for mechanism, quantile in (("gaussian", 0.0), ("matrix-noise", 0.5), ("randomised-laplace", 0.0))
]


@pytest.mark.parametrize("changes", PLANS)
def test_the_worlds_differ_by_one_users_clipped_units(changes: dict[str, Any]) -> None:
    plan = always_sampled(planned(**changes))
    canary, direction = worst_canary(plan)
    users = users_of(plan, np.array([CANARY]))
    assert users.num_users == plan.population / plan.units_per_user(3)
    updates = np.stack([np.zeros_like(canary), canary])
    rig = Rig(plan, users, updates, sampling_seed=1, noise_seed=2)
    inside, outside = rig.round(units_of(plan, np.array([0]))), rig.round(np.empty(0, dtype=np.int64))
    there, gone = rig.seen(inside, 0), rig.seen(outside, 0)
    units = plan.units_per_user(3)
    assert units == (1 if plan.redraws else 3)
    clip = rig.round().release.clip
    assert clip.reach(there.sum - gone.sum, rig.sizes) == pytest.approx(units, rel=1e-4)
    if plan.clip_rule is not None:
        moved = of_the_count(plan, there, direction) - of_the_count(plan, gone, direction)
        assert moved == pytest.approx(units / 2, abs=1e-6)


@pytest.mark.parametrize("mechanism", ["gaussian", "layer-noise", "matrix-noise", "adaptive-noise"])
def test_the_score_is_the_likelihood_ratios(mechanism: str) -> None:
    plan = always_sampled(planned(mechanism=mechanism))
    canary, direction = worst_canary(plan)
    rig = Rig(plan, users_of(plan, np.array([CANARY])), np.stack([0 * canary, canary]), sampling_seed=1, noise_seed=2)
    inside, outside = rig.round(np.array([0])), rig.round(np.empty(0, dtype=np.int64))
    shift = of_the_sum(plan, rig.seen(inside, 0), direction) - of_the_sum(plan, rig.seen(outside, 0), direction)
    scales = outside.release.clip.scales
    each = np.repeat([scales.get(name, 1.0) for name in rig.sizes], list(rig.sizes.values()))
    deviation = plan.noise_std * np.linalg.norm(each * direction)
    # No score shifts by more of its own standard deviations than the whitened canary's length.
    assert shift / deviation == pytest.approx(1 / plan.noise_multiplier, rel=1e-3)


def test_trials_are_independent() -> None:
    plan = always_sampled(planned())
    rig = Rig(plan, users_of(plan, np.array([0])), np.zeros((1, 8), dtype=np.float32), sampling_seed=1, noise_seed=2)
    scores = []
    for present in (units_of(plan, np.array([0])), np.empty(0, dtype=np.int64)):
        round = rig.round(present)
        start = state_of(round)
        for trial in range(200):
            round.load_state(start)
            scores.append(rig.seen(round, 2 * trial + (len(present) == 0)).sum)
    values = np.array(scores)
    assert len(np.unique(values[:, 0])) == len(values)
    for begin, end in ((0, 200), (200, 400)):
        assert abs(np.corrcoef(values[begin : end - 1, 0], values[begin + 1 : end, 0])[0, 1]) < 0.35
    assert abs(np.corrcoef(values[:200, 0], values[200:, 0])[0, 1]) < 0.35


def test_a_worst_case_canary_reaches_sixty_percent_of_epsilon_four() -> None:
    found = many_runs("canary", uls(), 700, 0.95, 3)
    assert not found.contradicts
    assert found.epsilon_certified == pytest.approx(4.0, rel=1e-3)
    assert 0.6 * found.epsilon_certified <= found.epsilon_lower <= found.epsilon_certified


@pytest.mark.parametrize("broken", [False, True])
def test_one_run_with_many_canaries_sees_whether_there_is_noise(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = uls(num_users=200, sampling_probability=0.2, steps=8, noise_multiplier=4.0)
    if broken:
        monkeypatch.setattr(GaussianNoise, "add", lambda self, total, clip, source: None)
    together, alone = one_run(plan, 200, 0.95, 3)
    assert together.contradicts is broken
    assert alone.contradicts is broken
    assert (together.epsilon_lower > together.epsilon_certified) is broken
    assert (together.epsilon_lower_free > together.epsilon_certified) is broken


@pytest.mark.parametrize("algorithm", ["uls", "els"])
def test_one_runs_canaries_are_users_in_or_out(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GaussianNoise, "add", lambda self, total, clip, source: None)
    plan = dataclasses.replace(planned(algorithm=algorithm), sampling_probability=1.0, steps=2)
    coins = np.random.default_rng(0).random(40) < 0.5
    each = 3 if isinstance(plan, ElsPlan) else 1
    # Two rounds that show `each` units more than nothing, or nothing.
    odds = each**2 / plan.noise_multiplier**2
    expected = pytest.approx(np.where(coins, odds, -odds), rel=1e-4)
    assert one_run_scores(plan, coins, 1, 2) == expected
    # A clip that holds each block by itself is used up too.
    names = ("blocks.0.weight", "blocks.1.weight")
    blocks = tuple(ClipBlock(parameters=(name,), share=0.5**0.5) for name in names)
    monkeypatch.setattr(GaussianNoise, "clip", lambda self, norm: Clip(norm=norm, blocks=blocks))
    assert one_run_scores(plan, coins, 1, 5) == expected


def test_the_scalar_laplace_claim_on_an_l2_clip_is_contradicted(monkeypatch: pytest.MonkeyPatch) -> None:
    def scalar(self: LaplaceNoise, total: np.ndarray, clip: Clip, source: Any) -> None:
        total += (clip.norm * sample_noise(law, len(total), source.generator())).astype(total.dtype)

    monkeypatch.setattr(LaplaceNoise, "clip", lambda self, norm: Clip(norm=norm, order=2))
    monkeypatch.setattr(RandomisedLaplace, "norm_order", 2)
    monkeypatch.setattr(LaplaceNoise, "add", scalar)
    law = NOISE_SHARP_AT_ZERO
    size = 1000
    plan = uls(mechanism=RandomisedLaplace(law=law))
    updates = np.stack([np.zeros(size), np.full(size, 100.0)]).astype(np.float32)
    rig = Rig(plan, CanaryUsers(np.ones(2, np.int64), np.array([1, 0])), updates, sampling_seed=1, noise_seed=2)
    shift = 1 / np.sqrt(size)
    scores: dict[bool, list[float]] = {True: [], False: []}
    for inside, found in scores.items():
        round = rig.round(np.arange(int(inside)))
        start = state_of(round)
        for trial in range(200):
            round.load_state(start)
            left = rig.seen(round, 2 * trial + (not inside)).sum / plan.clip_norm
            found.append(float(privacy_loss(law, shift - left, shift).sum()))
    rates = attack_rates(np.array(scores[True]), np.array(scores[False]), confidence=0.99)
    claimed = pure_epsilon(law)
    assert claimed < 1.1
    assert epsilon_free(rates, 0.0) > claimed


def in_bands(algorithm: str, **changes: Any) -> Plan:
    options = {"gradients_per_round": 20, "rounds": 6, "bands": "3", "algorithm": algorithm}
    return planned(**options | changes)


@pytest.mark.parametrize("changes", [{}, {"mechanism": "matrix-noise", "clip_quantile": 0.5}])
@pytest.mark.parametrize("algorithm", ["uls", "els"])
def test_a_chain_shows_one_turn_at_exactly_its_noise(algorithm: str, changes: dict[str, Any]) -> None:
    plan = always_sampled(in_bands(algorithm, **changes))
    assert plan.step_event().sampling_probability == 1.0  # type: ignore[attr-defined]
    canary, direction = worst_canary(plan)
    users = users_of(plan, np.array([CANARY]))
    rig = Rig(plan, users, np.stack([0 * canary, canary]), sampling_seed=1, noise_seed=2)
    turn = int(turns(plan, users, 1)[0])
    inside, outside = rig.round(units_of(plan, np.array([0]))), rig.round(np.empty(0, dtype=np.int64))
    each, start, found = rig.units_of_noise(outside), state_of(outside), []
    for _ in range(60):
        for round in (inside, outside):
            round.load_state(start)
        there, gone = one_turn(rig, inside, turn), one_turn(rig, outside, turn)
        # All of the canary is in what is looked at, and nothing of it is left out.
        shift = of_the_sum(plan, there, direction) - of_the_sum(plan, gone, direction)
        assert shift == pytest.approx(plan.units_per_user(3) * plan.clip_norm, rel=1e-3)
        if plan.clip_rule is not None:
            counted = of_the_count(plan, there, direction) - of_the_count(plan, gone, direction)
            assert counted == pytest.approx(plan.units_per_user(3) / 2, abs=1e-6)
        found.append(gone.sum / each)
    values = np.array(found)
    assert values.std() == pytest.approx(plan.sum_noise_multiplier, rel=5 / np.sqrt(2 * values.size))
    assert len(np.unique(values)) == values.size  # each chain has noise of its own
    nobody = np.empty(0, dtype=np.int64)
    other = one_turn(rig, rig.round(nobody, other_noise=1), turn)
    assert not np.isin(other.sum / each, values).any()
    # The likelihood ratio's statistic, from dense matrices.
    round, released = rig.round(nobody), []
    for number in range(turn + plan.bands):
        round.release.clip_norm = plan.clip_norm
        released.append(rig.seen(round, number).sum / each)
    c = np.array(plan.noise_coefficients)
    dense = sum(value * np.eye(len(released), k=-lag) for lag, value in enumerate(c))
    expected = dense[:, turn] @ dense @ np.array(released) / (c @ c)
    np.testing.assert_allclose(one_turn(rig, rig.round(nobody), turn).sum / each, expected, rtol=1e-9)


@pytest.mark.parametrize("bands", [1, 2, 3, 11])
def test_what_is_seen_of_a_chain_is_what_dense_matrices_make_of_it(bands: int) -> None:
    generator = np.random.default_rng(3)
    rounds, apart = 11, 3
    c = [1.0, 0.5, -0.25][:bands] if bands <= apart else (0.7 ** np.arange(bands)).tolist()
    released, turn = generator.standard_normal((rounds, 6)), np.array([0, 1, 2, 0, 1, 2])
    dense = sum(value * np.eye(rounds, k=-lag) for lag, value in enumerate(c))
    np.testing.assert_allclose(fresh(c, released), dense @ released)
    own = np.arange(rounds)[:, None] % apart == turn
    expected = (own * (dense.T @ dense @ released)).sum(axis=0)
    np.testing.assert_allclose(over_turns(c, apart, rounds, turn, released), expected)


@pytest.mark.parametrize("algorithm", ["uls", "els"])
def test_canaries_of_one_run_are_seen_in_their_turns(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FloatFilter, "add", lambda self, part, drawn, std: None)
    plan = in_bands(algorithm)
    plan = dataclasses.replace(plan, sampling_probability=always_sampled(plan).sampling_probability, steps=7)
    coins = np.random.default_rng(0).random(40) < 0.5
    users = users_of(plan, np.arange(40))
    turn = turns(plan, users, 1)
    assert set(turn) == {0, 1, 2}
    c = np.array(plan.noise_coefficients)
    # Of the last two rounds of all, fewer rows tell.
    seen = np.array([sum((c[: 7 - t] ** 2).sum() for t in range(first, 7, 3)) for first in turn])
    odds = seen / 2 * (plan.units_per_user(3) / plan.noise_multiplier / strength(plan)) ** 2
    np.testing.assert_allclose(one_run_scores(plan, coins, 1), np.where(coins, odds, -odds), rtol=1e-4)


def test_a_user_of_several_examples_has_one_turn() -> None:
    plan = in_bands("els", group_size=3)
    users = users_of(plan, np.arange(4))
    assert plan.units_per_user(3) == 3
    everybody = dataclasses.replace(plan, sampling_probability=always_sampled(plan).sampling_probability)
    for round, units in enumerate(everybody.sample(t, 9, population=plan.population_of(users, 9)) for t in range(6)):
        owners = np.unique(units // 3)
        assert len(units) == 3 * len(owners)
        assert (turns(plan, users, 9)[owners] == round % 3).all()
