"""Adaptive clipping: how σ is split, and that C finds the quantile."""

import math

import numpy as np
import pytest

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import Composed, Gaussian
from fedsim.privacy.mechanisms.quantile_clip import QuantileClip
from fedsim.randomness import StreamNoise

RULE = QuantileClip(quantile=0.5, learning_rate=0.2, count_std=4.0, expected_units=100.0)


def test_sum_and_count_together_are_one_gaussian_release() -> None:
    z = RULE.sum_noise_multiplier(1.3)
    assert z > 1.3
    # b − ½ has sensitivity ½, so the count alone has noise multiplier 2σ_b.
    split = Composed(events=(Gaussian(noise_multiplier=z), Gaussian(noise_multiplier=2 * RULE.count_std)))
    one = epsilon_bounds(Gaussian(noise_multiplier=1.3), 1e-5)
    both = epsilon_bounds(split, 1e-5)
    assert both.upper == pytest.approx(one.upper, rel=1e-6)


def test_no_contribution_exceeds_the_joint_sensitivity() -> None:
    z = RULE.sum_noise_multiplier(1.3)
    for below in (0.0, 1.0):
        assert math.hypot(1 / z, (below - 0.5) / RULE.count_std) <= 1 / 1.3 + 1e-12


def test_a_count_that_would_use_up_the_noise_is_refused() -> None:
    with pytest.raises(InvalidInput, match="clip-count-std"):
        QuantileClip(count_std=0.6, expected_units=10.0).sum_noise_multiplier(1.2)
    assert RULE.sum_noise_multiplier(0.0) == 0.0


@pytest.mark.parametrize("start", [0.01, 100.0])
def test_the_clip_norm_finds_the_quantile(start: float) -> None:
    generator = np.random.default_rng(0)
    clip_norm, source = start, StreamNoise(0, "count")
    for _ in range(150):
        norms = generator.lognormal(size=100)
        fraction = RULE.noised_fraction(float((norms <= clip_norm).sum()), 100.0, source, private=True)
        clip_norm = RULE.moved(clip_norm, fraction)
    assert clip_norm == pytest.approx(1.0, rel=0.3)


def test_only_the_noised_sum_of_centred_bits_enters() -> None:
    """A cohort of another size with the same Σ(b − ½) gives the same release: the realised size does not leak."""
    first = RULE.noised_fraction(60.0, 100.0, StreamNoise(1, "count"), private=True)
    second = RULE.noised_fraction(50.0, 80.0, StreamNoise(1, "count"), private=True)
    assert first == second
