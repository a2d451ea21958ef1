"""The privacy-loss distribution of randomised-scale Laplace noise on L1-clipped sums, sampling included."""

import math

import numpy as np
import pytest
from laws import LAWS
from scipy import stats

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import delta_bounds, epsilon_bounds
from fedsim.privacy.events import Adjacency, Repeated, from_json, to_json
from fedsim.privacy.mechanisms.laplace.event import RandomisedScaleLaplace
from fedsim.privacy.mechanisms.laplace.scalar import rdp_delta, scalar_delta
from fedsim.privacy.mechanisms.laplace.vector import laplace_curve, rounded_law, sample_release_noise

EPSILONS = np.array([-0.5, -0.05, 0.0, 0.05, 0.2, 0.5, 1.0])


def event_of(name: str, q: float = 1.0, group_size: int = 1) -> RandomisedScaleLaplace:
    return RandomisedScaleLaplace(law=LAWS[name], sampling_probability=q, group_size=group_size)


@pytest.mark.parametrize("name", ["uniform"])
@pytest.mark.parametrize(("q", "group_size"), [(0.3, 3), (1.0, 2)])
@pytest.mark.parametrize("remove", [True, False])
def test_curve_agrees_with_integration(name: str, q: float, group_size: int, remove: bool) -> None:
    weights = stats.binom.pmf(np.arange(group_size + 1), group_size, q)
    x = np.linspace(-120, 120, 12_001)
    expected = np.zeros(len(EPSILONS))
    for scale, mass in zip(*rounded_law(LAWS[name]), strict=True):
        null = 0.5 * scale * np.exp(-scale * np.abs(x))
        mixture = sum(w * 0.5 * scale * np.exp(-scale * np.abs(x - k)) for k, w in enumerate(weights))
        first, second = (mixture, null) if remove else (null, mixture)
        expected += mass * np.array([np.trapezoid(np.maximum(0, first - np.exp(e) * second), x) for e in EPSILONS])
    curve = laplace_curve(event_of(name, q, group_size), EPSILONS, remove=remove)
    np.testing.assert_allclose(curve, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", LAWS)
def test_one_contribution_agrees_with_several_of_which_one_can_come(name: str) -> None:
    """The closed form for G = 1 against the rounded law, which is never below it."""
    exact = laplace_curve(event_of(name, 0.3), EPSILONS, remove=True)
    scales, masses = rounded_law(LAWS[name])
    rounded = np.zeros(len(EPSILONS))
    for scale, mass in zip(scales, masses, strict=True):
        point = RandomisedScaleLaplace(law=(("point", 1.0, scale, 0.0),), sampling_probability=0.3)
        rounded += mass * laplace_curve(point, EPSILONS, remove=True)
    assert (exact <= rounded + 1e-6).all()
    np.testing.assert_allclose(exact[1:5], rounded[1:5], rtol=0.35)


def test_plain_laplace_with_sampling_has_its_closed_form() -> None:
    q, scale = 0.2, 0.9
    event = RandomisedScaleLaplace(law=(("point", 1.0, scale, 0.0),), sampling_probability=q)
    for epsilon in (0.02, 0.1, 0.15):
        inner = math.log1p(math.expm1(epsilon) / q)
        expected = q * max(0.0, 1 - math.exp((inner - scale) / 2))
        assert laplace_curve(event, epsilon, remove=True) == pytest.approx(expected, rel=1e-12)
        bounds = delta_bounds(event, epsilon)
        assert bounds.lower <= expected <= bounds.upper
    assert epsilon_bounds(event, 1e-6).upper == pytest.approx(math.log1p(q * math.expm1(scale)), rel=2e-3)


@pytest.mark.parametrize(("name", "q"), [("gamma", 0.1), ("uniform", 1.0), ("mixture", 0.1)])
def test_the_accountant_brackets_the_exact_curve(name: str, q: float) -> None:
    event = event_of(name, q)
    for epsilon in (0.1, 0.4):
        exact = max(float(laplace_curve(event, epsilon, remove=remove)) for remove in (True, False))
        bounds = delta_bounds(event, epsilon)
        assert bounds.lower <= exact <= bounds.upper
        assert bounds.gap < 2e-3


def test_revealing_the_scale_costs_and_renyi_bounds_both() -> None:
    for name in LAWS:
        for epsilon in (0.05, 0.3):
            hidden = scalar_delta(LAWS[name], epsilon)
            revealed = float(laplace_curve(event_of(name), epsilon, remove=True))
            assert hidden <= revealed + 1e-12
            assert revealed <= rdp_delta(LAWS[name], epsilon) + 1e-12


def test_composition_stays_below_the_renyi_bound() -> None:
    event = Repeated(event=event_of("uniform"), count=20)
    assert delta_bounds(event, 6.0).upper <= rdp_delta(LAWS["uniform"], 6.0, releases=20)


def test_sampling_and_group_size_move_epsilon_the_right_way() -> None:
    whole = epsilon_bounds(event_of("uniform"), 1e-5)
    sampled = epsilon_bounds(event_of("uniform", 0.1), 1e-5)
    several = epsilon_bounds(event_of("uniform", 0.1, 4), 1e-5)
    assert sampled.upper < whole.lower
    assert sampled.upper < several.lower


def test_sampled_noise_has_one_scale_for_the_vector() -> None:
    event = event_of("uniform", 0.5, 3)
    scales = rounded_law(LAWS["uniform"])[0]
    sizes = np.array([np.abs(sample_release_noise(event, 4000, np.random.default_rng(k))).mean() for k in range(200)])
    nearest = np.abs(1 / sizes[:, None] - scales[None]).min(axis=1)
    assert nearest.max() < 0.1
    assert (1 / sizes).std() > 0.15


def test_the_event_survives_json_and_refuses_what_it_cannot_account() -> None:
    event = event_of("mixture", 0.1, 4)
    assert from_json(to_json(event)) == event
    with pytest.raises(InvalidInput, match="adjacency"):
        epsilon_bounds(event, 1e-5, adjacency=Adjacency.REPLACE_ONE_USER)
    with pytest.raises(InvalidInput, match="law"):
        RandomisedScaleLaplace(law=(("gamma", 2.0, 1.0, 1.0),))
