"""Products of transforms: formed in pieces, where a float holds any of them, they are what one piece would give."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.privacy import certify, composition
from fedsim.privacy.accountant import delta_bounds
from fedsim.privacy.composition import _product
from fedsim.privacy.dominating_pairs import mixture_pair
from fedsim.privacy.events import Adjacency, PoissonSubsampledGaussian, Repeated
from fedsim.privacy.tilting import EPS, Window


def whole(spectra):
    """The product, the bound on its size and that on its error at all frequencies, none of them left out."""
    log_size = sum(count * np.log(np.abs(transform) + slip) for transform, slip, count in spectra)
    with np.errstate(divide="ignore"):
        relative = sum(count * np.log1p(slip / np.abs(transform)) for transform, slip, count in spectra)
    phase = sum(np.remainder(count * np.angle(transform), 2 * np.pi) for transform, _, count in spectra)
    turns = sum(count for *_, count in spectra)
    bound = np.exp(log_size)
    doubt = bound * (-np.expm1(-relative) + 8 * EPS * (turns * 4 + 4))
    return np.exp(log_size - relative) * np.exp(1j * phase), bound, doubt


@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([1, 30, 10**4]), st.sampled_from([1, 7, 64, 200]))
def test_no_frequency_counts_for_less(seed: int, measures: int, count: int, at_once: int) -> None:
    generator = np.random.default_rng(seed)
    spectra = []
    for _ in range(measures):
        sizes = np.exp(-generator.exponential(1, 100) * generator.choice([0, 0.01, 1, 50], 100))
        sizes[generator.integers(0, 100, 5)] = 0
        spectra.append((sizes * np.exp(2j * np.pi * generator.random(100)), 1e-14, count))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(composition, "AT_ONCE", at_once)
        found = _product(spectra)
    for ours, theirs in zip(found, whole(spectra), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_is_not_a_number_makes_no_bound_smaller() -> None:
    spectrum = np.full(9, 1e-200 + 0j)
    spectrum[4] = np.nan
    for found in _product([(spectrum, 1e-14, 100)]):
        assert np.isnan(found[4])
        assert not found[[0, 8]].any()


def test_what_a_window_leaves_out_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    step = PoissonSubsampledGaussian(sampling_probability=0.1, noise_multiplier=1.0)
    event, epsilon = Repeated(event=step, count=50), 2.0
    truth = delta_bounds(event, epsilon)
    find_window = certify.find_window

    def narrower(*asked: Any, **more: Any) -> Window:
        window = find_window(*asked, **more)
        middle, half = (window.low + window.high) / 2, 0.6 * window.width / 2
        return dataclasses.replace(window, low=middle - half, high=middle + half)

    monkeypatch.setattr(certify, "find_window", narrower)
    found = delta_bounds(event, epsilon, tolerance=0.5)
    assert found.lower <= truth.lower
    assert found.upper >= truth.upper
    assert found.upper > 1.01 * truth.upper  # so much was left out that forgetting it would show


def test_weights_too_small_to_keep_are_charged_as_losses_of_infinity() -> None:
    log_weights = np.array([np.log1p(-np.exp(-240.0)), -240.0, -250.0])
    pair = mixture_pair(np.arange(3.0), log_weights, 1.0, Adjacency.ADD_OR_REMOVE_ONE_USER)
    assert pair.left_out >= np.exp(-240.0) > 0
    assert (pair.cells(np.array([0.0, 0.5, 1.0])).p_error >= pair.left_out).all()
