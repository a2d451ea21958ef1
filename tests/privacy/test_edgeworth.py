"""The Edgeworth accountant estimates; it neither bounds nor certifies."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedsim.errors import InvalidInput
from fedsim.plan import UlsPlan
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.bounds import Bounds, Estimate
from fedsim.privacy.calibration import calibrate_noise_multiplier
from fedsim.privacy.edgeworth import ORDERS, _loss_sums, delta_estimate, epsilon_estimate, finite_sample_epsilon
from fedsim.privacy.events import (
    BinomialMixtureGaussian,
    Composed,
    Gaussian,
    MixtureOfGaussians,
    PoissonSubsampledGaussian,
    Repeated,
)
from fedsim.statement import privacy_statement

PUBLISHED = Repeated(
    event=PoissonSubsampledGaussian(sampling_probability=2000 / 392702, noise_multiplier=0.573), count=3920
)
"""EW-Tune's own setting, at δ = 1e-6."""
MANY_SMALL = Repeated(event=PoissonSubsampledGaussian(sampling_probability=0.5, noise_multiplier=50.0), count=1000)


def test_the_published_setting_reports_too_little() -> None:
    """Order 1 says 7.99, in the remove direction; the exact value is 9.56 to 9.60. Hence a diagnostic."""
    estimate = epsilon_estimate(PUBLISHED, 1e-6, order=1, direction="remove")
    assert estimate.value == pytest.approx(7.99, abs=0.005)
    exact = epsilon_bounds(PUBLISHED, 1e-6, tolerance=1e-4)
    assert 9.56 <= exact.lower <= exact.upper <= 9.60
    either = [epsilon_estimate(PUBLISHED, 1e-6, order=order, direction="remove").value for order in ORDERS]
    assert either == sorted(either), "higher orders come closer, still from below"
    assert either[-1] < exact.lower


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "event",
    [
        Gaussian(noise_multiplier=30.0),
        PoissonSubsampledGaussian(sampling_probability=1.0, noise_multiplier=30.0),
        BinomialMixtureGaussian(group_size=5, sampling_probability=1.0, noise_multiplier=150.0),
    ],
)
def test_without_sampling_every_order_is_exact(event: Any, order: int) -> None:
    run = Repeated(event=event, count=100)
    mu = 10 / 30
    for epsilon in (0.1, 1.0, 2.0):
        exact = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
        for direction in ("remove", "add"):
            estimate = delta_estimate(run, epsilon, order=order, direction=direction).value
            assert estimate == pytest.approx(exact, rel=1e-6, abs=1e-13)
    bounds = epsilon_bounds(run, 1e-6)
    assert bounds.lower <= epsilon_estimate(run, 1e-6, order=order).value * (1 + 1e-9)
    assert epsilon_estimate(run, 1e-6, order=order).value <= bounds.upper * (1 + 1e-9)
    assert finite_sample_epsilon(run, 1e-6, order=order).value == epsilon_estimate(run, 1e-6, order=order).value


@pytest.mark.parametrize(
    "event",
    [
        MANY_SMALL,
        Repeated(
            event=BinomialMixtureGaussian(group_size=8, sampling_probability=0.3, noise_multiplier=200.0), count=3000
        ),
        Composed(
            events=(
                Repeated(event=PoissonSubsampledGaussian(sampling_probability=0.3, noise_multiplier=20.0), count=400),
                Repeated(event=Gaussian(noise_multiplier=20.0), count=4),
                Repeated(
                    event=MixtureOfGaussians(
                        sensitivities=(0.0, 1.0, 2.0), probabilities=(0.5, 0.3, 0.2), noise_multiplier=60.0
                    ),
                    count=300,
                ),
            )
        ),
    ],
)
def test_orders_converge_where_every_step_is_small(event: Any) -> None:
    exact = epsilon_bounds(event, 1e-5, tolerance=1e-4)
    errors = [abs(epsilon_estimate(event, 1e-5, order=order).value - exact.upper) for order in ORDERS]
    assert errors[0] > errors[1]
    assert errors[3] < 3e-4 * exact.upper


def test_the_series_has_the_moments_of_the_sum() -> None:
    """Order k has the moments up to 7 of a law with cumulants up to k + 2, less products of higher order."""
    present, _ = _loss_sums(Repeated(event=PUBLISHED.event, count=20_000))
    skew, kurtosis, fifth = present.cumulants[2:] / present.std ** np.arange(3, 6)
    z = np.linspace(-14, 14, 40_001)
    middle = (z[1:] + z[:-1]) / 2
    expected = {
        1: {3: skew, 4: 3, 5: 10 * skew},
        2: {3: skew, 4: 3 + kurtosis, 5: 10 * skew, 6: 15 + 15 * kurtosis + 10 * skew**2},
        3: {5: 10 * skew + fifth, 7: 105 * skew + 21 * fifth + 35 * skew * kurtosis},
    }
    for order, moments in expected.items():
        mass = -np.diff(present.above(present.mean + z * present.std, order, 1))
        for power, value in moments.items():
            assert mass @ middle**power == pytest.approx(value, rel=1e-4), (order, power)
    assert present.series(3)[9] == pytest.approx(280 * skew**3 / math.factorial(9))


@pytest.mark.parametrize("order", ORDERS)
def test_the_add_direction_mirrors_the_sum(order: int) -> None:
    present, _ = _loss_sums(PUBLISHED)
    epsilon = np.linspace(0, 12, 25)
    mirrored = 1 - present.above(-epsilon, order, 1)
    np.testing.assert_allclose(present.above(epsilon, order, -1), mirrored, atol=1e-12)


def test_the_finite_sample_bound_holds_where_it_is_finite() -> None:
    exact = epsilon_bounds(MANY_SMALL, 0.05)
    for order in ORDERS:
        bound = finite_sample_epsilon(MANY_SMALL, 0.05, order=order).value
        assert exact.upper <= bound < 1.05 * exact.upper
        assert bound > epsilon_estimate(MANY_SMALL, 0.05, order=order).value
        present, absent = _loss_sums(MANY_SMALL)
        margin = present.distance(order) + math.exp(bound) * absent.distance(order)
        ends = [delta_estimate(MANY_SMALL, bound, order=order, direction=way).value for way in ("remove", "add")]
        assert max(ends) + margin == pytest.approx(0.05, rel=1e-3)


def test_the_finite_sample_bound_is_infinite_at_the_published_setting() -> None:
    assert finite_sample_epsilon(PUBLISHED, 1e-6, order=1).value == math.inf


def test_the_finite_sample_distance_bounds_a_simulated_distribution() -> None:
    """Its bound on the distance of distribution functions holds for losses drawn by Monte Carlo."""
    q, sigma, steps, runs = 0.2, 1.0, 25, 40_000
    generator = np.random.default_rng(7)
    draws = generator.normal(0, sigma, (runs, steps)) + (generator.random((runs, steps)) < q)
    losses = np.log(1 - q + q * np.exp((2 * draws - 1) / (2 * sigma**2))).sum(axis=1)
    run = Repeated(event=PoissonSubsampledGaussian(sampling_probability=q, noise_multiplier=sigma), count=steps)
    present, _ = _loss_sums(run)
    assert losses.mean() == pytest.approx(present.mean, abs=5 * present.std / math.sqrt(runs))
    assert losses.std() == pytest.approx(present.std, rel=0.03)
    points = np.sort(losses)
    for order in ORDERS:
        distance = np.abs(np.arange(runs) / runs - (1 - present.above(points, order, 1))).max()
        assert distance <= present.distance(order) + 1.63 / math.sqrt(runs)
        assert distance > (0.004 if order == 0 else 0.0)


def test_nothing_released_is_epsilon_zero() -> None:
    assert epsilon_estimate(Composed(events=()), 1e-5).value == 0
    assert delta_estimate(Repeated(event=Gaussian(noise_multiplier=1.0), count=0), 1.0).value == 0


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("order", {"order": 4}),
        ("order", {"order": -1}),
        ("direction", {"direction": "sideways"}),
        ("delta", {"delta": 0.0}),
        ("delta", {"delta": math.nan}),
    ],
)
def test_bad_arguments_are_named(field: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        epsilon_estimate(PUBLISHED, **({"delta": 1e-5} | arguments))
    assert caught.value.field == field


def test_an_event_without_such_a_pair_is_refused() -> None:
    with pytest.raises(InvalidInput, match="event"):
        epsilon_estimate("a release of another kind", 1e-5)  # type: ignore[arg-type]


def test_an_estimate_certifies_and_calibrates_nothing() -> None:
    estimate = epsilon_estimate(PUBLISHED, 1e-6)
    assert isinstance(estimate, Estimate)
    assert not hasattr(estimate, "upper")
    with pytest.raises(TypeError):
        Bounds(lower=estimate, upper=estimate)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        float(estimate)  # type: ignore[arg-type]
    with pytest.raises((TypeError, InvalidInput)):
        calibrate_noise_multiplier(lambda noise: Gaussian(noise_multiplier=noise), epsilon=estimate, delta=1e-6)  # type: ignore[arg-type]
    plan = UlsPlan(
        num_users=10,
        group_size=1,
        clip_norm=1.0,
        sampling_probability=0.5,
        noise_multiplier=50.0,
        steps=1000,
        delta=1e-6,
    )
    stated = privacy_statement(plan, MANY_SMALL, sizes={"all": 1}, steps=1000, versions={})
    with pytest.raises(TypeError, match="certifies nothing"):
        dataclasses.replace(stated, epsilon=estimate)  # type: ignore[arg-type]


def test_the_type_checker_refuses_an_estimate_as_a_bound(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    program = tmp_path / "claim.py"
    program.write_text(
        "from fedsim.privacy.bounds import Bounds, Estimate\n"
        "def certify(epsilon: Bounds) -> float:\n"
        "    return epsilon.upper\n"
        'guess = Estimate(value=7.99, method="Edgeworth")\n'
        "certify(guess)\n"
        "guess.upper\n"
    )
    # What the module of bounds imports, and the package's face with all that it offers, says nothing of either kind.
    command = [sys.executable, "-m", "mypy", "--follow-imports", "skip", "--cache-dir", str(tmp_path)]
    command += ["fedsim/privacy/bounds.py", str(program)]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "claim.py:5: error" in checked.stdout
    assert "claim.py:6: error" in checked.stdout
