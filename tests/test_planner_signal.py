"""Effective rounds: the ranks they must get right, limits that can be done by hand, and how alike units are."""

import dataclasses

import numpy as np
import pytest

from fedsim.config import OptimizerConfig
from fedsim.errors import InvalidInput
from fedsim.plan import ElsPlan, UlsPlan, UserSizes
from fedsim.plan.bands import forecasts_for
from fedsim.planner import ASSUMED_SIGNAL, SignalCurve, Target, calibrated_plans, effective_rounds

SMALL_LLAMA = 260_032
"""Its parameters."""
IRC_SIGNAL = SignalCurve.measured([1], [0.11])
"""As measured on that corpus with that model before training."""


def predicted(cohort: int, rounds: int, bands: int, epsilon: float) -> float:
    """Effective rounds of ULS with G = 1 on 14,302 users, with Adam's workload."""
    sizes = UserSizes.of_quantiles(14_302, {0.5: 1})
    target = Target(epsilon=epsilon, delta=1e-5, gradients_per_round=cohort, rounds=rounds)
    plan = calibrated_plans(sizes, target, {"uls": [1]})[0]
    workload = OptimizerConfig(name="adam").workload(rounds)
    near = plan.noise_multiplier
    found = forecasts_for(plan, bands, workload, epsilon=epsilon, tolerance=0.01, precision=1e-3, near=near)
    return effective_rounds(plan, IRC_SIGNAL, SMALL_LLAMA, found[-1].ratio)


OBSERVED = {
    8.0: {
        (128, 200, 1): 3.373,
        (128, 200, 4): 3.256,
        (128, 200, 16): 3.269,
        (256, 100, 1): 3.343,
        (256, 100, 4): 3.212,
        (512, 50, 1): 3.263,
        (512, 50, 4): 3.191,
        (1024, 25, 1): 3.251,
        (1024, 25, 2): 3.259,
    },
    2.0: {(128, 200, 1): 3.481, (128, 200, 4): 3.400, (128, 200, 16): 3.447, (512, 50, 1): 3.412, (512, 50, 4): 3.396},
}
"""Held-out loss of one seed by (cohort, rounds, bands) at ε, equal compute: chat by nick, ULS with G = 1, Adam at the
best learning rate tried, δ = 1e-5; 5.178 before training."""


SEED = 0.02
"""Nats by which losses of one seed may differ by chance."""


def pairs_ranked(rounds: dict, observed: dict, beyond: float) -> tuple[int, int]:
    """Of pairs whose losses differ by more, how many are ranked rightly, and how many there are."""
    pairs = [(one, two) for one in observed for two in observed if observed[two] - observed[one] > beyond]
    return sum(rounds[one] > rounds[two] for one, two in pairs), len(pairs)


@pytest.mark.parametrize("epsilon", OBSERVED)
def test_the_split_of_equal_compute_is_ranked_as_trained_models_rank_it(epsilon: float) -> None:
    observed = OBSERVED[epsilon]
    rounds = {split: predicted(*split, epsilon) for split in observed}
    right, pairs = pairs_ranked(rounds, observed, SEED)
    assert right == pairs >= 6
    assert max(rounds, key=rounds.__getitem__) == min(observed, key=observed.__getitem__) == (512, 50, 4)
    independent = {split: loss for split, loss in observed.items() if split[2] == 1}
    right, pairs = pairs_ranked(rounds, independent, 0.0)
    assert right == pairs, "cohorts and rounds alone, however close"


SHAKESPEARE_SIGNAL = SignalCurve.measured([1, 2, 4, 8, 16], [0.12, 0.22, 0.33, 0.48, 0.63])
"""As measured there with that model before training."""
SPEECHES = UserSizes.of_quantiles(1_098, {0.1: 1, 0.25: 3, 0.5: 13, 0.75: 45, 0.9: 125, 0.99: 336, 1: 768})


def test_group_sizes_are_ranked_as_trained_models_rank_them() -> None:
    observed = {("uls", 1): 3.709, ("uls", 4): 3.629, ("uls", 8): 3.615, ("uls", 16): 3.618}
    observed |= {("els", 1): 3.714, ("els", 4): 3.728, ("els", 13): 3.757}
    target = Target(epsilon=1.0, delta=1e-5, gradients_per_round=1024, rounds=25)
    plans = calibrated_plans(SPEECHES, target, {"uls": [1, 4, 8, 16], "els": [1, 4, 13]})
    signal = SHAKESPEARE_SIGNAL.among(SPEECHES)
    rounds = {(plan.name, plan.group_size): effective_rounds(plan, signal, SMALL_LLAMA) for plan in plans}
    right, pairs = pairs_ranked(rounds, observed, SEED)
    assert right == pairs


def uls(**changes: float) -> UlsPlan:
    common = {"group_size": 1, "clip_norm": 3.0, "noise_multiplier": 0.5, "steps": 10, "delta": 1e-5}
    return UlsPlan(num_users=1000, sampling_probability=0.1, **{**common, **changes})


def test_effective_rounds_are_the_squared_cosine_of_a_release_with_what_units_share() -> None:
    signal, d, rng = SignalCurve.measured([1], [0.25]), 500, np.random.default_rng(0)
    plan = uls(noise_multiplier=0.6)
    shared = np.zeros(d)
    shared[0] = 1.0
    squares = []
    for _ in range(400):
        apart = rng.normal(size=(100, d))
        apart[:, 0] = 0
        units = 0.5 * shared + np.sqrt(0.75) * apart / np.linalg.norm(apart, axis=1, keepdims=True)
        release = 3.0 * units.sum(axis=0) + plan.noise_std * rng.normal(size=d)
        squares.append((release[0] / np.linalg.norm(release)) ** 2)
    assert effective_rounds(plan, signal, d) == pytest.approx(10 * np.mean(squares), rel=0.02)


def test_no_noise_and_many_units_are_worth_every_round_and_much_noise_none() -> None:
    assert effective_rounds(uls(noise_multiplier=0.0), SignalCurve.measured([1], [1.0]), 10**9) == 10
    assert effective_rounds(uls(noise_multiplier=1e6), ASSUMED_SIGNAL, 10**6) < 1e-6
    plan = uls()
    half = effective_rounds(plan, ASSUMED_SIGNAL, 1000, noise_ratio=0.5)
    assert half == pytest.approx(effective_rounds(uls(noise_multiplier=0.25), ASSUMED_SIGNAL, 1000))
    assert half > effective_rounds(plan, ASSUMED_SIGNAL, 1000)


def test_examples_are_the_units_of_els_whatever_a_user_keeps() -> None:
    plan = ElsPlan(
        num_examples=400, sampling_probability=0.1, group_size=4, clip_norm=1, noise_multiplier=2, steps=9, delta=0.1
    )
    same = dataclasses.replace(plan, group_size=1)
    assert effective_rounds(plan, ASSUMED_SIGNAL, 50) == effective_rounds(same, ASSUMED_SIGNAL, 50)
    assert effective_rounds(uls(group_size=8), ASSUMED_SIGNAL, 50) > effective_rounds(uls(), ASSUMED_SIGNAL, 50)


def test_users_who_own_few_examples_share_less_than_those_who_fill_a_group() -> None:
    curve = SignalCurve.measured([1, 4, 16], [0.1, 0.3, 0.6])
    sizes = UserSizes.of_quantiles(10, {0.5: 4})
    few = curve.among(sizes)
    assert few(1) == pytest.approx(curve(1))
    assert few(16) == pytest.approx(curve(4)) == pytest.approx(few(4))
    halves = UserSizes(num_users=2, sizes=np.array([1, 16]), users=np.array([3, 1]), source="", private=False)
    assert curve.among(halves)(16) == pytest.approx((3 * curve(1) + curve(16)) / 4)


def test_means_of_examples_keep_what_they_share() -> None:
    rng, d = np.random.default_rng(1), 4000
    shared, users = rng.normal(size=d), rng.normal(size=(300, d))
    examples = np.sqrt(0.1) * shared + np.sqrt(0.1) * users[:, None] + np.sqrt(0.8) * rng.normal(size=(300, 8, d))
    means = examples.mean(axis=1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    total = means.sum(axis=0)
    square = (total @ total - 300) / (300 * 299)
    assert SignalCurve.of_similarity("assumed", 0.1, 0.2)(8) ** 2 == pytest.approx(square, rel=0.05)


def test_signals_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidInput, match="alignment"):
        SignalCurve.of_similarity("assumed", 0.3, 0.2)
    with pytest.raises(InvalidInput, match="similarity"):
        SignalCurve.of_similarity("assumed", 0.0, 0.2)
    with pytest.raises(InvalidInput, match="group_sizes"):
        SignalCurve.measured([2], [0.5])
    assert SignalCurve.measured([1], [-0.1])(1) == pytest.approx(0.01), "too little to be told from nothing"
    with pytest.raises(InvalidInput, match="parameters"):
        effective_rounds(uls(), ASSUMED_SIGNAL, 0)
