"""Coordinates that are released apart are, end to end, the release of the whole: or it is said why they cannot be."""

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest

from fedsim.clip import Clip
from fedsim.errors import Failure
from fedsim.plan import UlsPlan
from fedsim.privacy.mechanisms import MECHANISMS, GaussianNoise
from fedsim.randomness import BLOCK
from fedsim.release import CoordinateNoise, Release, why_whole

SIZES = {"h.0.weight": 2 * BLOCK + 100, "h.0.bias": 7, "h.1.weight": BLOCK - 50, "wte.weight": 3 * BLOCK + 1}
TOTAL = sum(SIZES.values())
CUTS = [0, BLOCK, 2 * BLOCK, 5 * BLOCK, TOTAL]
PLAN = UlsPlan(
    num_users=100,
    sampling_probability=0.2,
    group_size=2,
    clip_norm=0.5,
    noise_multiplier=1.5,
    steps=10,
    delta=1e-5,
)


def plan_with(mechanism: str) -> UlsPlan:
    return dataclasses.replace(PLAN, mechanism=MECHANISMS.build(mechanism))


@pytest.mark.parametrize("mechanism", ["gaussian", "matrix-noise"])
@pytest.mark.parametrize("resolution", [0.0, 2.0**-30])
def test_parts_are_the_bits_of_the_whole(mechanism: str, resolution: float) -> None:
    release = Release(plan_with(mechanism), SIZES, 7, exact=resolution > 0)
    assert why_whole(release) == ""
    steps = np.random.default_rng(0).integers(-(2**20), 2**20, TOTAL)
    total = steps if resolution else (steps / 2**20).astype(np.float32)
    whole = steps * resolution if resolution else total.copy()
    expected = release.noised_mean(whole, release.clip, 3, attempt=1, resolution=resolution).astype(np.float32)
    noise = CoordinateNoise.of(release, release.clip, 3, 1, 0, resolution)
    noise.require_all(TOTAL)
    told = CoordinateNoise.from_values(json.loads(json.dumps(noise.to_values())))
    parts = [told.mean(total[start:stop].copy(), start) for start, stop in itertools.pairwise(CUTS)]
    np.testing.assert_array_equal(np.concatenate(parts), expected)
    other = CoordinateNoise.of(release, release.clip, 3, 1, 1, resolution).mean(total[:BLOCK].copy(), 0)
    assert not np.array_equal(other, expected[:BLOCK])


class OtherNormals(GaussianNoise):
    """What it says of its noise is a hint, and another than what it adds."""

    def normals(self, clip: Clip) -> tuple[tuple[int, float], ...]:
        return ()


class OtherNoise(GaussianNoise):
    """It adds none."""

    def add(self, total: np.ndarray, clip: Clip, source: Any) -> None:
        pass


def with_noise(kind: type[GaussianNoise]) -> Release:
    release = Release(PLAN, SIZES, 7)
    release.noise = kind(1.5, SIZES)
    return release


@pytest.mark.parametrize(
    ("release", "reason"),
    [
        (lambda: Release(PLAN, SIZES, None), "secure noise"),
        (lambda: Release(plan_with("adaptive-noise"), SIZES, 7), "learns from whole releases"),
        (lambda: Release(plan_with("randomised-laplace"), SIZES, 7), "not plain Gaussian"),
        (lambda: with_noise(OtherNormals), "not plain Gaussian"),
        (lambda: with_noise(OtherNoise), "not plain Gaussian"),
    ],
)
def test_what_must_be_released_whole_is_not_released_in_parts(release: Any, reason: str) -> None:
    made = release()
    assert reason in why_whole(made)
    with pytest.raises(Failure, match=reason):
        CoordinateNoise.of(made, Clip(norm=0.5), 0, 0, 0, 0.0)


@pytest.mark.parametrize("size", [TOTAL - 1, TOTAL + 1])
def test_no_coordinate_goes_without_noise(size: int) -> None:
    noise = CoordinateNoise.of(Release(PLAN, SIZES, 7), Clip(norm=0.5), 0, 0, 0, 0.0)
    with pytest.raises(Failure, match="cannot be released"):
        noise.require_all(size)
