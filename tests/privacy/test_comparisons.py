"""Other accountants beside the tight pair: where they must agree, and that they are never below it."""

import math

import dp_accounting
import numpy as np
import pytest
from scipy import stats

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.bounds import Bounds, Estimate, LooseBound
from fedsim.privacy.comparisons import compare
from fedsim.privacy.events import (
    Adjacency,
    BinomialMixtureGaussian,
    Composed,
    Gaussian,
    PoissonSubsampledGaussian,
    Repeated,
)
from fedsim.privacy.group_privacy import group_privacy_epsilon
from fedsim.privacy.renyi import ORDERS, renyi_divergences, renyi_epsilon

ELS = Repeated(event=BinomialMixtureGaussian(group_size=4, sampling_probability=0.01, noise_multiplier=1.0), count=100)


@pytest.mark.parametrize(
    ("q", "sigma", "steps"), [(0.01, 1.0, 1000), (0.1, 5.0, 100), (1.0, 20.0, 100), (0.001, 0.4, 50)]
)
def test_renyi_agrees_with_dp_accounting_at_whole_orders(q: float, sigma: float, steps: int) -> None:
    orders = [order for order in ORDERS if order == int(order) and order <= 256]
    oracle = dp_accounting.rdp.RdpAccountant(orders)
    step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
    oracle.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    event = PoissonSubsampledGaussian(sampling_probability=q, noise_multiplier=sigma)
    places = [list(ORDERS).index(order) for order in orders]
    ours = steps * renyi_divergences(event, Adjacency.ADD_OR_REMOVE_ONE_USER)[places]
    finite = np.isfinite(ours)
    assert finite[:40].all()
    np.testing.assert_allclose(ours[finite], np.array(oracle._rdp)[finite], rtol=1e-6, atol=1e-9)
    run = Repeated(event=event, count=steps)
    epsilon = renyi_epsilon(run, 1e-6).value
    assert epsilon <= oracle.get_epsilon(1e-6) * (1 + 1e-9), "more orders can only lower it"
    assert epsilon >= epsilon_bounds(run, 1e-6).lower


def test_renyi_of_a_gaussian_is_known() -> None:
    divergences = renyi_divergences(Gaussian(noise_multiplier=2.0), Adjacency.ADD_OR_REMOVE_ONE_USER)
    np.testing.assert_allclose(divergences, ORDERS / 8, rtol=1e-9)
    replaced = renyi_divergences(Gaussian(noise_multiplier=2.0), Adjacency.REPLACE_ONE_USER)
    np.testing.assert_allclose(replaced, ORDERS / 2, rtol=1e-9)


def test_group_privacy_of_one_example_is_the_tight_value() -> None:
    event = Repeated(
        event=BinomialMixtureGaussian(group_size=1, sampling_probability=0.01, noise_multiplier=1.0), count=100
    )
    tight = epsilon_bounds(event, 1e-6)
    assert group_privacy_epsilon(event, 1e-6).value == pytest.approx(tight.upper, rel=0.011)


def test_group_privacy_chains_the_example_level_guarantee() -> None:
    """At p = 1 one example's curve is a Gaussian's: the chain is solved here by hand."""
    group, sigma, delta = 3, 8.0, 1e-5
    event = Repeated(
        event=BinomialMixtureGaussian(group_size=group, sampling_probability=1.0, noise_multiplier=sigma), count=4
    )
    mu = 2 / sigma

    def excess(epsilon: float) -> float:
        one = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
        return one * sum(math.exp(i * epsilon) for i in range(group)) - delta

    from scipy.optimize import brentq

    assert group_privacy_epsilon(event, delta).value == pytest.approx(group * brentq(excess, 0.01, 5), rel=0.02)


def test_group_privacy_without_an_answer_is_infinite() -> None:
    event = Repeated(
        event=BinomialMixtureGaussian(group_size=400, sampling_probability=0.5, noise_multiplier=0.5), count=10
    )
    assert group_privacy_epsilon(event, 1e-6).value == math.inf


def test_group_privacy_refuses_other_releases() -> None:
    with pytest.raises(InvalidInput, match="event"):
        group_privacy_epsilon(Gaussian(noise_multiplier=1.0), 1e-6)
    with pytest.raises(InvalidInput, match="event"):
        group_privacy_epsilon(Composed(events=()), 1e-6)


def test_the_table_names_kinds_and_keeps_their_order() -> None:
    rows = compare(ELS, 1e-6)
    assert [row.kind for row in rows] == ["certified", "looser upper bound", "looser upper bound", *["estimate"] * 5]
    tight, renyi, group = rows[0].epsilon, rows[1].epsilon, rows[2].epsilon
    assert isinstance(tight, Bounds)
    assert isinstance(renyi, LooseBound)
    assert isinstance(group, LooseBound)
    assert all(isinstance(row.epsilon, Estimate) for row in rows[3:])
    assert tight.upper < group.value
    assert tight.upper < renyi.value
    assert rows[0].value == tight.upper


def test_replacing_leaves_out_what_is_not_defined() -> None:
    run = Repeated(event=PoissonSubsampledGaussian(sampling_probability=0.1, noise_multiplier=4.0), count=10)
    rows = compare(run, 1e-6, adjacency=Adjacency.REPLACE_ONE_USER)
    assert [row.kind for row in rows] == ["certified", "looser upper bound"]
    assert rows[0].value <= rows[1].value
