"""What is said of a release's noise is what is in it, whatever mechanism and correlation made it."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.plan import UlsPlan
from fedsim.privacy.mechanisms import MECHANISMS
from fedsim.release import Release, release_norms
from fedsim.sampling import Turns

SIZE = 40_000
PLAN = UlsPlan(
    num_users=100,
    sampling_probability=0.2,
    group_size=2,
    clip_norm=0.5,
    noise_multiplier=1.5,
    steps=12,
    delta=1e-5,
)
TURNS: dict[str, Any] = {"sampling": Turns(), "sampling_probability": 1 / 3}
ROUNDS = 5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mechanism": MECHANISMS.build("layer-noise")},
        {"clip_quantile": 0.5, "clip_count_std": 5.0},
        {"noise_coefficients": (1.0, 0.5, 0.375)} | TURNS,
        {"noise_buffers": ((0.3, 0.9), (0.2, 0.5))} | TURNS,
    ],
    ids=["gaussian", "layers", "moving-clip", "bands", "buffers"],
)
def test_the_expected_norm_of_noise_is_that_of_what_is_added_round_after_round(changes: dict[str, Any]) -> None:
    plan = dataclasses.replace(PLAN, **changes)
    release = Release(plan, {"a": SIZE // 4, "b": SIZE - SIZE // 4}, 3)
    release.begin_chain(0, 0)
    for round in range(ROUNDS):
        clip = release.clip
        noise = release.noised_mean(np.zeros(SIZE, np.float32), clip, round)
        norms = release_norms(release, noise, clip, round)
        assert norms["released_norm"] == pytest.approx(float(np.linalg.norm(noise)))
        assert norms["noise_norm"] == pytest.approx(norms["released_norm"], rel=0.02)
        assert release_norms(release, torch.from_numpy(noise), clip, round) == pytest.approx(norms)
        release.observe(noise, np.zeros(SIZE, np.float32), {"units": 20.0, "clipped_units": 15.0}, round)


def test_of_a_run_without_privacy_nothing_is_told() -> None:
    free = dataclasses.replace(PLAN, noise_multiplier=0.0)
    release = Release(free, {"a": SIZE}, 3)
    assert release_norms(release, np.ones(SIZE, np.float32), release.clip, 0) == {}
