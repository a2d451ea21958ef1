"""Where a mixture's tail begins, and the best tilt of a Chernoff bound: against scipy's root and its minimum."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from fedsim.privacy import gaussian_pairs
from fedsim.privacy.certify import LOG_NOTHING
from fedsim.privacy.dominating_pairs import dominating_pair
from fedsim.privacy.events import Adjacency, BinomialMixtureGaussian
from fedsim.privacy.gaussian_pairs import NEAR, Mixture
from fedsim.privacy.loss_grid import sketch
from fedsim.privacy.tilting import best_tilt, log_kernels, log_moments

weights = st.lists(st.floats(1e-12, 1.0), min_size=1, max_size=6)
noises = st.floats(0.05, 50.0)


@settings(max_examples=60)
@given(weights, noises, st.floats(-290, -0.01), st.sampled_from([1, 12, gaussian_pairs.CHUNK]))
def test_the_tail_begins_where_no_more_is_left_and_just_there(
    shares: list[float], noise: float, power: float, chunk: int
) -> None:
    total = np.array(shares) / sum(shares)
    mixture = Mixture(np.arange(len(shares)) / noise, np.log(total))
    tail = 10.0**power
    with mock.patch.object(gaussian_pairs, "CHUNK", chunk):
        place = mixture.least_above(tail)

    def left(x: float) -> float:
        return float(mixture.weights @ norm.sf(x - mixture.means))

    assert left(place) <= tail * (1 + 1e-12)
    assert left(place - 2 * NEAR) > tail


@pytest.mark.parametrize("noise", [0.3, 1.0, 30.0])
@pytest.mark.parametrize("count", [1, 1000, 1_000_000])
@pytest.mark.parametrize("asked", [{"delta": 1e-6}, {"delta": 1e-30}, {"epsilon": 0.5}, {"epsilon": 8.0}])
def test_the_best_tilt_is_as_good_as_what_a_minimiser_finds(noise: float, count: int, asked: dict[str, float]) -> None:
    event = BinomialMixtureGaussian(group_size=4, sampling_probability=0.01, noise_multiplier=noise)
    pair = dominating_pair(event, Adjacency.ADD_OR_REMOVE_ONE_USER)
    parts = [(sketch(pair, pair.loss_range(1e-40), swapped=False), count)]

    def bound(log_tilt: float) -> float:
        tilts = np.exp([log_tilt])
        value = float((log_moments(parts, tilts) + log_kernels(tilts))[0])
        return (value - np.log(asked["delta"])) / tilts[0] if "delta" in asked else value - tilts[0] * asked["epsilon"]

    tilt, found = best_tilt(parts, **asked)
    least = minimize_scalar(bound, bounds=(np.log(tilt) - 3, np.log(tilt) + 3), method="bounded").fun
    assert found == pytest.approx(bound(np.log(tilt)))
    # Below that a δ counts as none; of an ε past the largest loss there is no best tilt.
    assert found <= max(least + 1e-3 * abs(least), LOG_NOTHING)
