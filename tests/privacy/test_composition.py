"""Products of transforms: formed in pieces, where a float holds any of them, they are what one piece would give."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.privacy import composition
from fedsim.privacy.composition import _product
from fedsim.privacy.tilting import EPS


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
