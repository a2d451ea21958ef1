"""The sampler, the moment generating function and the tails of a law agree."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAWS

from fedsim.errors import InvalidInput
from fedsim.privacy.mechanisms.laplace.inverse_scale import (
    check_law,
    log_mgf,
    log_mgf_slope,
    log_tail,
    rescaled,
    sample_inverse_scales,
)

DRAWS = 200_000


def assert_mean(values: np.ndarray, expected: float) -> None:
    """The sample mean is within five standard errors of what was computed."""
    error = values.std() / math.sqrt(len(values)) + 1e-12
    assert abs(values.mean() - expected) < 5 * error


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("t", [-20.0, -3.0, -0.5, 0.0, 0.4])
def test_sampler_has_the_moments_of_the_generating_function(name: str, t: float) -> None:
    draws = sample_inverse_scales(LAWS[name], DRAWS, np.random.default_rng(1))
    assert (draws > 0).all()
    assert_mean(np.exp(t * draws), math.exp(log_mgf(LAWS[name], t)))
    assert_mean(np.exp(t * draws) * (draws > 0.6), math.exp(log_tail(LAWS[name], t, 0.6)))
    if t <= 0:
        assert_mean(draws * np.exp(t * draws), math.exp(log_mgf_slope(LAWS[name], t)))


@pytest.mark.parametrize("name", LAWS)
def test_slope_is_the_derivative(name: str) -> None:
    for t in (-1e3, -30.0, -1.0, -1e-3):
        step = 1e-5 * max(1.0, abs(t))
        numeric = (log_mgf(LAWS[name], t + step) - log_mgf(LAWS[name], t - step)) / (2 * step)
        relative = log_mgf_slope(LAWS[name], t) - log_mgf(LAWS[name], t)
        assert numeric == pytest.approx(math.exp(relative), rel=1e-5)


@pytest.mark.parametrize("name", LAWS)
def test_rescaling_the_law_rescales_the_argument(name: str) -> None:
    for t in (-5.0, -0.1, 0.3):
        assert log_mgf(rescaled(LAWS[name], 0.7), t) == pytest.approx(
            log_mgf(LAWS[name], 0.7 * t), rel=1e-9, abs=1e-12
        )


def test_orders_at_or_past_a_pole_are_infinite() -> None:
    assert log_mgf(LAWS["gamma"], 5.0) == math.inf
    assert log_mgf(LAWS["gamma"], 7.0) == math.inf
    assert log_mgf(LAWS["exponential"], 2.0) == math.inf
    assert math.isfinite(log_mgf(LAWS["uniform"], 50.0))


@settings(max_examples=60)
@given(t=st.floats(-1e6, 0.0), x=st.floats(0.0, 1e3))
def test_tails_are_numbers_between_nothing_and_everything(t: float, x: float) -> None:
    for law in LAWS.values():
        assert log_tail(law, t, x) <= log_mgf(law, t) + 1e-9


@pytest.mark.parametrize(
    "law",
    [
        (),
        (("cauchy", 1.0, 1.0, 1.0),),
        (("gamma", 0.5, 1.0, 1.0),),
        (("gamma", 1.0, -1.0, 1.0),),
        (("uniform", 1.0, 2.0, 1.0),),
        (("truncated-normal", 1.0, 0.0, math.nan),),
        (("gamma", 1.0, 1.0),),
    ],
)
def test_bad_laws_are_refused(law: tuple) -> None:
    with pytest.raises(InvalidInput, match="law"):
        check_law(law)
