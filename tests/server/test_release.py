"""Releases with each mechanism: what noise is added, and that the next round learns from released values alone."""

import dataclasses

import numpy as np
import pytest

from fedsim.clip import Clip
from fedsim.errors import Failure
from fedsim.plan import ElsPlan, UlsPlan, plan_from_json
from fedsim.privacy.events import PoissonSubsampledGaussian
from fedsim.privacy.mechanisms import MECHANISMS, GaussianNoise, RandomisedLaplace
from fedsim.privacy.mechanisms.laplace.event import RandomisedScaleLaplace
from fedsim.release import Release

SIZES = {"h.0.attn.weight": 6000, "h.0.attn.bias": 500, "h.1.attn.weight": 1500, "wte.weight": 12_000}
TOTAL = sum(SIZES.values())
PLAN = UlsPlan(
    num_users=100,
    sampling_probability=0.2,
    group_size=2,
    clip_norm=0.5,
    noise_multiplier=1.5,
    steps=10,
    delta=1e-5,
)


def plan_with(mechanism: str = "gaussian", **changes: object) -> UlsPlan:
    return dataclasses.replace(PLAN, mechanism=MECHANISMS.build(mechanism), **changes)  # type: ignore[arg-type]


def released(release: Release, round: int = 0) -> np.ndarray:
    return release.noised_mean(np.zeros(TOTAL, dtype=np.float32), release.clip, round)


def test_gaussian_noise_has_the_planned_scale_whatever_the_parameters() -> None:
    noise = released(Release(PLAN, SIZES, 7))
    assert noise.std() * PLAN.normaliser == pytest.approx(1.5 * 0.5, rel=0.02)
    np.testing.assert_array_equal(noise, released(Release(PLAN, {"all": TOTAL}, 7)))


def test_unequal_scales_reach_noise_and_clip_alike() -> None:
    release = Release(plan_with(mechanism="matrix-noise"), SIZES, 7)
    scales = release.clip.scales
    assert set(scales) == set(SIZES)
    assert scales["h.0.attn.weight"] == scales["h.0.attn.bias"]
    noise, start = released(release), 0
    for name, size in SIZES.items():
        std = noise[start : start + size].std() * PLAN.normaliser
        assert std == pytest.approx(0.75 * scales[name], rel=0.1)
        start += size
    assert release.clip.bound == pytest.approx(0.5 * max(scales.values()))


def test_adaptive_noise_begins_as_the_plain_gaussian_bit_for_bit() -> None:
    adaptive = Release(plan_with(mechanism="adaptive-noise"), SIZES, 7)
    assert adaptive.clip.scales == {}
    np.testing.assert_array_equal(released(adaptive), released(Release(PLAN, SIZES, 7)))


def test_epsilon_does_not_depend_on_scales() -> None:
    for name in ("adaptive-noise", "layer-noise", "matrix-noise"):
        assert plan_with(mechanism=name).event() == PLAN.event()
        assert plan_with(mechanism=name).epsilon() == PLAN.epsilon()


def rounds_of(release: Release, statistics: dict[str, float], rounds: int = 6) -> list[dict[str, float]]:
    parameters = np.linspace(0.1, 1.0, TOTAL).astype(np.float32)
    seen = []
    for round in range(rounds):
        mean = release.noised_mean(np.full(TOTAL, 0.1, dtype=np.float32), release.clip, round)
        release.observe(mean, parameters, statistics, round)
        seen.append(dict(release.clip.scales))
    return seen


def test_unreleased_data_does_not_reach_the_scales() -> None:
    plan = plan_with(mechanism="adaptive-noise")
    few = {"units": 3.0, "clipped_units": 1.0, "loss_sum": 9.0, "nonfinite_units": 1.0}
    many = {"units": 90.0, "clipped_units": 80.0, "loss_sum": 0.1, "nonfinite_units": 0.0}
    first, second = Release(plan, SIZES, 7), Release(plan, SIZES, 7)
    scales = rounds_of(first, few)
    assert scales == rounds_of(second, many)
    assert scales[-1] != {}
    assert first.clip_norm == second.clip_norm == 0.5


def test_the_clip_norm_follows_a_noised_count_that_the_plan_pays_for() -> None:
    plan = plan_with(clip_quantile=0.5, clip_count_std=2.0)
    assert plan.event() == PLAN.event()
    assert plan.sum_noise_multiplier > plan.noise_multiplier
    release = Release(plan, SIZES, 7)
    noise = released(release)
    assert noise.std() * plan.normaliser == pytest.approx(plan.sum_noise_multiplier * 0.5, rel=0.02)
    for round in range(20):
        release.observe(noise, noise, {"units": 20.0, "clipped_units": 20.0}, round)
    assert release.clip_norm > 0.5 * 2
    again = Release(plan, SIZES, 7)
    again.load_state(release.state())
    assert again.clip_norm == release.clip_norm


def test_state_resumes_scales() -> None:
    plan = plan_with(mechanism="adaptive-noise")
    release = Release(plan, SIZES, 7)
    rounds_of(release, {"units": 1.0})
    again = Release(plan, SIZES, 7)
    again.load_state(release.state())
    assert again.clip.scales == release.clip.scales != {}


def test_laplace_noise_is_accounted_as_such_and_clips_in_l1() -> None:
    law = (("gamma", 1.0, 3.0, 0.4),)
    plan = dataclasses.replace(PLAN, mechanism=RandomisedLaplace(law=law))
    event = plan.step_event()
    assert isinstance(event, RandomisedScaleLaplace)
    assert event.law == (("gamma", 1.0, 3.0, 0.4 / 1.5),)
    assert event.sampling_probability == PLAN.sampling_probability
    assert Release(plan, SIZES, 7).clip.order == 1
    sizes = [np.abs(released(Release(plan, SIZES, seed))).mean() for seed in range(400)]
    # E|X| = C·E[1/S] = C/(θ(k − 1)).
    assert np.mean(sizes) * plan.normaliser == pytest.approx(0.5 * 1.5 / (0.4 * 2), rel=0.15)


def test_els_charges_the_group_for_laplace_noise() -> None:
    values = {item.name: getattr(PLAN, item.name) for item in dataclasses.fields(PLAN)}
    for name in ("num_users", "local_steps", "local_learning_rate"):
        values.pop(name)
    plan = ElsPlan(**values | {"num_examples": 200, "mechanism": RandomisedLaplace()})
    event = plan.step_event()
    assert isinstance(event, RandomisedScaleLaplace)
    assert event.group_size == 2


@pytest.mark.parametrize("name", MECHANISMS)
def test_plans_with_any_mechanism_survive_messages(name: str) -> None:
    plan = plan_with(mechanism=name)
    assert plan_from_json(plan.to_json()) == plan
    if name != "randomised-laplace":
        assert isinstance(plan.step_event(), PoissonSubsampledGaussian)


@pytest.mark.parametrize("name", MECHANISMS)
def test_without_privacy_nothing_is_added(name: str) -> None:
    assert not released(Release(plan_with(mechanism=name, noise_multiplier=0.0), SIZES, 7)).any()


class NothingAhead(GaussianNoise):
    """Says that nothing of its noise is known before."""

    def normals(self, clip: Clip) -> tuple[tuple[int, float], ...]:
        return ()


def test_what_can_be_drawn_ahead_decides_nothing_about_the_noise() -> None:
    silent = Release(PLAN, SIZES, 7)
    silent.noise = NothingAhead(PLAN.sum_noise_multiplier, SIZES)
    np.testing.assert_array_equal(released(silent), released(Release(PLAN, SIZES, 7)))
    assert released(silent).std() > 0


@pytest.mark.parametrize("size", [TOTAL - 1, TOTAL + 1, 2 * TOTAL])
def test_a_sum_some_values_of_which_would_get_no_noise_is_not_released(size: int) -> None:
    release = Release(PLAN, SIZES, 7)
    with pytest.raises(Failure, match=f"a sum of {size} values cannot be released for {TOTAL} parameters"):
        release.noised_mean(np.zeros(size, np.float32), release.clip, 0)
