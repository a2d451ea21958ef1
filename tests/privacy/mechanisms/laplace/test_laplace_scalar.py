"""Randomised-scale Laplace noise on one number, and why its guarantee is no guarantee for L2-clipped vectors."""

import math

import numpy as np
import pytest
from laws import GAMMA, LAWS
from scipy import integrate, stats

from fedsim.privacy.mechanisms.laplace.inverse_scale import Law
from fedsim.privacy.mechanisms.laplace.scalar import (
    log_density,
    privacy_loss,
    pure_epsilon,
    rdp_delta,
    rdp_epsilon,
    renyi_divergence,
    sample_noise,
    scalar_delta,
)

EPSILON = 0.3


def delta_by_quadrature(law: Law, epsilon: float) -> float:
    """δ(ε) = ∫ (f(x) − e^ε f(x−1))₊ dx by adaptive quadrature: an independent check of scalar_delta."""

    def excess(x: float) -> float:
        return max(0.0, math.exp(log_density(law, np.float64(x))) - math.exp(epsilon + log_density(law, x - 1.0)))

    # On x < 0 substitute x = −(e^y − 1): the tail may be heavy.
    left = integrate.quad(lambda y: excess(1 - math.exp(y)) * math.exp(y), 0, 30, limit=500, epsabs=1e-12)[0]
    delta: float = left + integrate.quad(excess, 0, 1, limit=500, epsabs=1e-12)[0]
    return delta


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.2, 0.5])
def test_exact_delta_agrees_with_quadrature_and_stays_below_the_renyi_bound(name: str, epsilon: float) -> None:
    exact = scalar_delta(LAWS[name], epsilon)
    assert exact == pytest.approx(delta_by_quadrature(LAWS[name], epsilon), abs=1e-7)
    assert exact <= rdp_delta(LAWS[name], epsilon) + 1e-12


def test_the_laplace_limit_has_its_closed_form() -> None:
    for scale in (0.3, 0.8, 2.0):
        law = (("point", 1.0, scale, 0.0),)
        assert pure_epsilon(law) == pytest.approx(scale)
        for epsilon in (0.0, 0.1, 0.25):
            assert scalar_delta(law, epsilon) == pytest.approx(1 - math.exp((epsilon - scale) / 2), rel=1e-12)
        for alpha in (1.5, 2.0, 7.0):
            closed = math.log(
                (alpha * math.exp((alpha - 1) * scale) + (alpha - 1) * math.exp(-alpha * scale)) / (2 * alpha - 1)
            ) / (alpha - 1)
            assert renyi_divergence(law, alpha) == pytest.approx(closed, rel=1e-12)


def test_a_narrow_law_tends_to_laplace() -> None:
    for width in (1e-2, 1e-4):
        narrow = (("uniform", 1.0, 0.8 - width, 0.8 + width),)
        assert scalar_delta(narrow, 0.2) == pytest.approx(1 - math.exp((0.2 - 0.8) / 2), rel=2 * width)


def test_renyi_orders_past_the_pole_are_infinite_and_never_chosen() -> None:
    assert renyi_divergence(GAMMA, np.array([5.9, 6.0, 30.0])).tolist()[1:] == [math.inf, math.inf]
    assert math.isfinite(rdp_epsilon(GAMMA, 1e-5))
    assert rdp_epsilon(GAMMA, 1e-5, orders=np.array([6.0, 30.0])) == math.inf
    assert rdp_delta(GAMMA, 1.0, orders=np.array([6.0])) == 1.0


def test_smaller_shifts_are_no_worse() -> None:
    # A shift of Δ under inverse scale S is a shift of 1 under ΔS.
    from fedsim.privacy.mechanisms.laplace.inverse_scale import rescaled

    for law in LAWS.values():
        deltas = [scalar_delta(rescaled(law, shift), 0.1) for shift in (0.1, 0.4, 0.7, 1.0)]
        assert deltas == sorted(deltas)


@pytest.mark.parametrize("name", LAWS)
def test_sampled_noise_follows_the_density(name: str) -> None:
    drawn = sample_noise(LAWS[name], 4000, np.random.default_rng(3))
    grid = np.concatenate([-np.geomspace(1e5, 1e-4, 4000), np.geomspace(1e-4, 1e5, 4000)])
    mass = np.diff(grid) * np.exp(log_density(LAWS[name], (grid[1:] + grid[:-1]) / 2))
    cdf = np.interp(drawn, grid[1:], np.cumsum(mass))
    assert stats.kstest(cdf, "uniform").pvalue > 1e-3


def delta_interval(shift: np.ndarray, *, draws: int) -> tuple[float, float]:
    """δ(EPSILON) of independent noise on each coordinate, by Monte Carlo: five standard errors to both sides."""
    generator = np.random.default_rng(11)
    law = (("gamma", 1.0, 3.0, 0.1),)
    gains = []
    for _ in range(0, draws, 100):
        noise = sample_noise(law, (100, len(shift)), generator)
        losses = privacy_loss(law, noise, shift).sum(axis=1)
        gains.append(np.maximum(0.0, 1 - np.exp(EPSILON - losses)))
    values = np.concatenate(gains)
    half = 5 * float(values.std()) / math.sqrt(draws)
    return float(values.mean()) - half, float(values.mean()) + half


@pytest.mark.parametrize("dimension", [1, 100, 10_000])
def test_the_scalar_claim_fails_under_l2_clipping_and_holds_under_l1(dimension: int) -> None:
    claimed = scalar_delta((("gamma", 1.0, 3.0, 0.1),), EPSILON)
    draws = 600 if dimension == 10_000 else 10_000
    one = np.zeros(dimension)
    one[0] = 1.0
    flat = np.full(dimension, 1.0)
    l2_low, _ = delta_interval(flat / math.sqrt(dimension), draws=draws)
    if dimension > 1:
        assert l2_low > claimed
    for shift in (one, flat / dimension):
        low, _ = delta_interval(shift, draws=draws)
        assert low <= claimed
