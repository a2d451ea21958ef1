"""Whitened clips bound every update, whatever the scales and whatever the update, infinities and NaN included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.audit.canaries import PrescribedLoss, PrescribedUpdates, sizes_of
from fedsim.clip import Clip
from fedsim.gradients import clipped_sum
from fedsim.rows import TokenRows

SIZE = 16
NAMES = list(sizes_of(SIZE))

numbers = st.one_of(
    st.floats(-1e3, 1e3, width=32),
    st.sampled_from([np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-45, 0.0]),
)


@settings(max_examples=60)
@given(
    update=st.lists(numbers, min_size=SIZE, max_size=SIZE),
    exponents=st.tuples(st.floats(-6, 6), st.floats(-6, 6)),
    clip_norm=st.floats(1e-3, 1e3),
)
@pytest.mark.parametrize("norm_order", [1, 2])
def test_whitened_norms_never_exceed_the_clip(
    norm_order: int, update: list[float], exponents: tuple[float, float], clip_norm: float
) -> None:
    scales = {name: 10.0**exponent for name, exponent in zip(NAMES, exponents, strict=True)}
    rows = np.array([update], dtype=np.float32)
    result = clipped_sum(
        PrescribedUpdates(rows).eval(),
        TokenRows.from_lists([[0]]),
        np.zeros(1, dtype=np.int64),
        Clip(norm=clip_norm, order=norm_order, scales=scales),
        objective=PrescribedLoss(),
    )
    each = np.repeat([scales[name] for name in NAMES], list(sizes_of(SIZE).values()))
    whitened = result.total.numpy().astype(np.float64) / each
    assert np.isfinite(whitened).all()
    assert np.linalg.norm(whitened, norm_order) <= clip_norm * (1 + 1e-12)
    if not np.isfinite(rows).all():
        assert not whitened.any()
        assert not result.finite.any()


def test_equal_scales_are_no_scales_bit_for_bit() -> None:
    rows = np.random.default_rng(0).standard_normal((3, SIZE)).astype(np.float32)
    totals = [
        clipped_sum(
            PrescribedUpdates(rows).eval(),
            TokenRows.from_lists([[0], [1], [2]]),
            np.arange(3),
            Clip(norm=0.7, scales=scales),
            objective=PrescribedLoss(),
        ).total.numpy()
        for scales in ({}, dict.fromkeys(NAMES, 1.0))
    ]
    np.testing.assert_array_equal(*totals)
