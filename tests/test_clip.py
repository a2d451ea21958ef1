"""A clip carries its own bound: what it says holds for everything that was brought within it."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.clip import Clip, ClipBlock
from fedsim.errors import InvalidInput

SIZES = {"a.weight": 3, "a.bias": 1, "b.weight": 4}
SCALES = {"a.weight": 0.5, "a.bias": 2.0, "b.weight": 1.25}
BLOCKS = (
    ClipBlock(parameters=("a.weight", "a.bias"), share=2**-0.5),
    ClipBlock(parameters=("b.weight",), share=2**-0.5),
)


def clips() -> list[Clip]:
    halves = tuple(ClipBlock(parameters=block.parameters, share=0.5) for block in BLOCKS)
    return [
        Clip(norm=0.7),
        Clip(norm=0.7, order=1),
        Clip(norm=0.7, scales=SCALES),
        Clip(norm=0.7, order=1, scales=SCALES),
        Clip(norm=0.7, blocks=BLOCKS),
        Clip(norm=0.7, blocks=BLOCKS, scales=SCALES),
        Clip(norm=0.7, order=1, blocks=halves),
    ]


def whitened(clip: Clip, update: np.ndarray) -> np.ndarray:
    each = np.repeat([clip.scales.get(name, 1.0) for name in SIZES], list(SIZES.values()))
    return update / each


@settings(max_examples=50)
@given(values=st.lists(st.floats(-1e3, 1e3), min_size=8, max_size=8))
@pytest.mark.parametrize("clip", clips(), ids=lambda clip: clip.in_words())
def test_an_update_brought_within_reach_keeps_every_bound(clip: Clip, values: list[float]) -> None:
    update = np.array(values)
    update /= max(1.0, clip.reach(update, SIZES))
    assert np.linalg.norm(update) <= clip.bound * (1 + 1e-12)
    assert np.linalg.norm(whitened(clip, update), clip.order) <= clip.norm * (1 + 1e-12)
    for index, limit in enumerate(clip.limits):
        inside = np.repeat([place == index for place in clip.block_of(tuple(SIZES))], list(SIZES.values()))
        assert np.linalg.norm(whitened(clip, update)[inside], clip.order) <= limit * (1 + 1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_a_reach_is_never_less_than_in_exact_arithmetic(order: int) -> None:
    generator = np.random.default_rng(4)
    sizes, clip = {"a": 5, "b": 4}, Clip(norm=0.7, order=order)
    by_parameter = dataclasses.replace(clip, scales={"a": 1.0, "b": 1.0})
    for _ in range(60):
        update = generator.standard_normal(9)
        exact = sum(abs(Fraction(value)) ** order for value in update)
        for reach in (clip.reach(update, sizes), by_parameter.reach(update, sizes)):
            assert (Fraction(reach) * Fraction(clip.norm)) ** order >= exact
            assert reach <= float(exact) ** (1 / order) / clip.norm * (1 + 1e-13)


@settings(max_examples=50)
@given(
    values=st.lists(st.floats(-1, 1), min_size=8, max_size=8).filter(lambda values: max(map(abs, values)) > 0.1),
    reach=st.sampled_from([0.5, 1.0, 1 + 1e-6, 1.01, 1.5, 2.5]) | st.floats(0.1, 5),
)
@pytest.mark.parametrize("clip", clips(), ids=lambda clip: clip.in_words())
def test_a_block_beyond_its_limit_is_brought_to_it_and_no_other_changes(
    clip: Clip, values: list[float], reach: float
) -> None:
    update = np.array(values)
    update *= reach / clip.reach(update, SIZES)
    clipped = clip.applied(update, SIZES)
    assert clipped.dtype == np.float32
    assert clip.reach(clipped.astype(np.float64), SIZES) <= 1
    for index, limit in enumerate(clip.limits):
        inside = np.repeat([place == index for place in clip.block_of(tuple(SIZES))], list(SIZES.values()))
        norm = float(np.linalg.norm(whitened(clip, update)[inside], clip.order))
        kept = min(1.0, limit / norm) if norm > 0 else 1.0
        np.testing.assert_allclose(clipped[inside], kept * update[inside], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("clip", clips(), ids=lambda clip: clip.in_words())
def test_the_extreme_update_uses_up_every_limit(clip: Clip) -> None:
    extreme = clip.extreme(SIZES)
    assert clip.reach(extreme, SIZES) == pytest.approx(1.0)
    assert np.count_nonzero(extreme) == len(clip.limits)
    assert np.linalg.norm(whitened(clip, extreme), clip.order) == pytest.approx(clip.norm)


def test_the_bound_follows_the_largest_scale() -> None:
    assert Clip(norm=0.001, scales=SCALES).bound == 0.002
    assert Clip(norm=0.5).bound == 0.5


@pytest.mark.parametrize("clip", clips(), ids=lambda clip: clip.in_words())
def test_clips_travel_as_json(clip: Clip) -> None:
    assert Clip.from_json(clip.to_json()) == clip


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"norm": 0.0}, "clip.norm"),
        ({"norm": np.nan}, "clip.norm"),
        ({"norm": 1.0, "order": 3}, "clip.order"),
        ({"norm": 1.0, "scales": {"a": 0.0}}, "clip.scales"),
        ({"norm": 1.0, "blocks": (ClipBlock(parameters=("a",), share=0.8), ClipBlock(parameters=("b",), share=0.8))},
         "clip.blocks"),
        ({"norm": 1.0, "blocks": (ClipBlock(parameters=("a", "a"), share=0.5),)}, "clip.blocks"),
        ({"norm": 1.0, "blocks": (ClipBlock(parameters=("a",), share=0.0),)}, "share"),
        ({"norm": 1.0, "blocks": (ClipBlock(parameters=(), share=0.5),)}, "clip.blocks"),
    ],
)  # fmt: skip
def test_a_clip_that_bounds_nothing_is_refused(values: dict, field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        Clip(**values)


def test_scales_and_blocks_that_leave_a_parameter_out_are_refused() -> None:
    for clip in (Clip(norm=1.0, scales={"a.weight": 0.5}), Clip(norm=1.0, blocks=BLOCKS[:1])):
        with pytest.raises(InvalidInput, match="exactly the trainable parameters"):
            clip.require_parameters(SIZES)
        with pytest.raises(InvalidInput, match="exactly the trainable parameters"):
            clip.reach(np.ones(8), SIZES)
    Clip(norm=1.0, scales=SCALES, blocks=BLOCKS).require_parameters(SIZES)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_never_within_reach(value: float) -> None:
    update = np.array([value, *[0.0] * 7])
    for clip in clips():
        assert not clip.reach(update, SIZES) <= 1
