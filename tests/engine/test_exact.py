"""Fixed-point sums: exact, order-free, and never longer than the clip."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsim.clip import Clip, ClipBlock
from fedsim.engine.exact import dequantise, quantise, resolution_for

bounds = st.floats(1e-6, 1e6)
vectors = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e6, 1e6, width=32))


def clip32(update: np.ndarray, norm_bound: float) -> np.ndarray:
    """Clipping as a gradient engine does it, all in float32 and so a little too long at times."""
    norm = np.linalg.norm(update)
    return update * np.float32(min(1.0, norm_bound / norm)) if norm > 0 else update


def exact_steps(update: np.ndarray, bound: float, resolution: float) -> np.ndarray:
    return quantise(update, Clip(norm=bound), {"all": len(update)}, resolution)


def exact_square(values: np.ndarray, resolution: float) -> Fraction:
    return sum((Fraction(int(v)) ** 2 for v in values), Fraction(0)) * Fraction(resolution) ** 2


@settings(max_examples=300)
@given(update=vectors, bound=bounds, max_units=st.integers(1, 2**20))
def test_norm_never_exceeds_the_bound_in_exact_arithmetic(update: np.ndarray, bound: float, max_units: int) -> None:
    resolution = resolution_for(Clip(norm=bound), max_units)
    steps = exact_steps(clip32(update, bound), bound, resolution)
    assert exact_square(steps, resolution) <= Fraction(bound) ** 2


@settings(max_examples=200)
@given(update=vectors, bound=bounds, max_units=st.integers(1, 2**20))
def test_truncation_moves_toward_zero_by_less_than_a_step(update: np.ndarray, bound: float, max_units: int) -> None:
    short = (clip32(update, bound) * np.float32(0.99)).astype(np.float32)
    resolution = resolution_for(Clip(norm=bound), max_units)
    back = dequantise(exact_steps(short, bound, resolution), resolution)
    lost = np.abs(short.astype(np.float64)) - np.abs(back)
    assert (lost >= 0).all()
    assert (lost < resolution).all()
    assert (back * short >= 0).all()


def test_a_float32_clip_that_is_too_long_is_shortened() -> None:
    rng = np.random.default_rng(0)
    too_long = 0
    for _ in range(200):
        update = clip32(rng.normal(size=50).astype(np.float32) * 9, 1.0)
        resolution = resolution_for(Clip(norm=1.0), 1000)
        exact_before = sum((Fraction(float(v)) ** 2 for v in update), Fraction(0))
        too_long += exact_before > 1
        assert exact_square(exact_steps(update, 1.0, resolution), resolution) <= 1
    assert too_long > 20


@given(bound=bounds, max_units=st.integers(1, 2**40))
def test_resolution_leaves_no_room_for_overflow_and_wastes_no_bit_twice(bound: float, max_units: int) -> None:
    resolution = resolution_for(Clip(norm=bound), max_units)
    assert Fraction(bound) / Fraction(resolution) * max_units <= 2**53
    assert Fraction(bound) / Fraction(resolution) * max_units * 4 > 2**53


def test_sum_does_not_depend_on_order_where_the_float_sum_does() -> None:
    rng = np.random.default_rng(1)
    updates = [
        clip32(rng.normal(size=1000).astype(np.float32) * 10.0**e, 1.0) for e in range(-4, 4) for _ in range(20)
    ]
    resolution = resolution_for(Clip(norm=1.0), len(updates))
    steps = [exact_steps(update, 1.0, resolution) for update in updates]
    order = rng.permutation(len(updates))
    floats = np.sum(updates, axis=0), np.sum([updates[i] for i in order], axis=0)
    whole = np.sum(steps, axis=0), np.sum([steps[i] for i in order], axis=0)
    assert not np.array_equal(*floats)
    assert np.array_equal(*whole)
    np.testing.assert_allclose(dequantise(whole[0], resolution), floats[0], atol=1e-5)


@pytest.mark.parametrize("where", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize(
    "bad", [np.float32([np.nan]), np.float32([np.inf]), np.float32([1.5]), np.float32([3e38, 3e38])]
)
def test_what_was_not_clipped_is_refused(bad: np.ndarray, where: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="is not clipped"):
        exact_steps(where(bad), 1.0, resolution_for(Clip(norm=1.0), 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_has_the_steps_of_an_array_and_stays_as_it_is(dtype: torch.dtype) -> None:
    clip, generator = Clip(norm=1.0, scales=SCALES), torch.Generator().manual_seed(0)
    for _ in range(50):
        update = torch.randn(8, generator=generator, dtype=dtype) * 0.02
        before = update.clone()
        steps = quantise(update, clip, SIZES, 2.0**-40)
        assert torch.equal(update, before)
        assert steps.dtype == torch.int64
        np.testing.assert_array_equal(steps.numpy(), quantise(update.numpy(), clip, SIZES, 2.0**-40))


@pytest.mark.parametrize("units", [0, 2**53])
def test_more_units_than_can_be_summed_exactly_are_refused(units: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        resolution_for(Clip(norm=1.0), units)


SIZES = {"a": 3, "b": 5}
SCALES = {"a": 0.3, "b": 1.7}
BLOCKS = (ClipBlock(parameters=("a",), share=0.6), ClipBlock(parameters=("b",), share=0.8))


@settings(max_examples=100)
@given(update=hnp.arrays(np.float32, 8, elements=st.floats(-1e3, 1e3, width=32)), bound=st.floats(1e-3, 1e3))
@pytest.mark.parametrize("given_clip", [{}, {"scales": SCALES}, {"order": 1}, {"blocks": BLOCKS}])
@pytest.mark.parametrize("where", [np.asarray, torch.from_numpy])
def test_every_clip_holds_exactly_on_the_grid(
    where: Callable[..., Any], given_clip: dict, update: np.ndarray, bound: float
) -> None:
    clip = Clip(norm=bound, **given_clip)
    reach = clip.reach(update.astype(np.float64), SIZES)
    close = (update / np.float32(max(1.0, reach * 0.9999))).astype(np.float32)  # a little too long where it is long
    resolution = resolution_for(clip, 1000)
    steps = np.asarray(quantise(where(close), clip, SIZES, resolution))
    scales = np.repeat([clip.scales.get(name, 1.0) for name in SIZES], list(SIZES.values()))
    whitened = [
        abs(Fraction(int(v)) * Fraction(resolution) / Fraction(float(s))) for v, s in zip(steps, scales, strict=True)
    ]
    for index, limit in enumerate(clip.limits):
        places = np.repeat([block == index for block in clip.block_of(tuple(SIZES))], list(SIZES.values()))
        inside = [value for value, here in zip(whitened, places, strict=True) if here]
        assert sum(value**clip.order for value in inside) <= Fraction(limit) ** clip.order
