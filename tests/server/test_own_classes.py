"""What mechanisms and sampling schemes from outside the package return is checked before anything is charged."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mock_training import training, uls_plan

from fedsim.clip import Clip
from fedsim.errors import InvalidInput
from fedsim.privacy.events import Event, Gaussian
from fedsim.privacy.mechanisms import GaussianNoise, Mechanism, Sizes
from fedsim.release import CLIP_NORM, Release
from fedsim.sampling import Poisson, Population, Streams

SIZES = {"a": 3, "b": 5}


@dataclass(frozen=True, kw_only=True)
class Own(Mechanism):
    """The plain Gaussian, but for what a test gives it."""

    name = "own"
    summary = "for tests"

    clips: Any = None
    own_event: Event | None = None
    own_sigma: float | None = None

    def noise(self, release: Event | None, noise_multiplier: float, sizes: Sizes) -> GaussianNoise:
        sigma = noise_multiplier if self.own_sigma is None else self.own_sigma
        return OwnNoise(sigma, sizes, self.clips or (lambda norm: Clip(norm=norm)))

    def event(self, sampled: Event) -> Event:
        return self.own_event or sampled


class OwnNoise(GaussianNoise):
    def __init__(self, sigma: float, sizes: Sizes, clips: Any) -> None:
        super().__init__(sigma, sizes)
        self._clips, self.kept = clips, np.array(0.0)

    def clip(self, norm: float) -> Clip:
        made: Clip = self._clips(norm)
        return made

    def state(self) -> dict[str, np.ndarray]:
        return {CLIP_NORM: self.kept}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.kept = arrays[CLIP_NORM]


@dataclass(frozen=True, kw_only=True)
class Draws(Poisson):
    """Draws what a test says."""

    drawn: Any = ()

    def draw(self, population: Population, probability: float, round: int, streams: Streams) -> np.ndarray:
        return np.asarray(self.drawn)


@dataclass(frozen=True, kw_only=True)
class Halves(Poisson):
    """Two halves that take turns: which unit is in which is drawn once for the whole run."""

    def draw(self, population: Population, probability: float, round: int, streams: Streams) -> np.ndarray:
        half = streams().permutation(population.size)[round % 2 :: 2]
        return np.sort(half[streams(round).random(len(half)) < 0.5])


@pytest.mark.parametrize("drawn", [[-1, 3], [3, 3], [4, 2], [0, 50], [1.5], [[1, 2]]])
def test_a_draw_that_is_no_set_of_places_is_refused_before_a_charge(drawn: Any, tmp_path: Path) -> None:
    run = training(tmp_path, uls_plan(sampling=Draws(drawn=drawn)))
    with pytest.raises(InvalidInput, match="it must be a scheme that draws places from 0 to 49"):
        run.run()
    assert len(run.budget.ledger) == 0


def test_any_set_of_places_is_taken() -> None:
    for drawn in ([], [0], [0, 49], np.array([7], dtype=np.int32)):
        np.testing.assert_array_equal(uls_plan(sampling=Draws(drawn=drawn)).sample(0, 1), drawn)


def test_what_is_fixed_for_the_whole_run_stays_when_a_round_runs_again() -> None:
    plan = uls_plan(sampling=Halves())
    first, again, other = plan.sample(0, 1), plan.sample(0, 1, 1), plan.sample(1, 1)
    assert not np.array_equal(first, again)
    assert len(np.intersect1d(first, again)) > 0
    for attempt in (first, again, plan.sample(0, 1, 2)):
        assert len(np.intersect1d(attempt, other)) == 0


@pytest.mark.parametrize(
    ("clips", "field"),
    [
        (lambda norm: Clip(norm=norm, scales={"a": 0.5}), "clip.scales"),
        (lambda norm: Clip(norm=norm, order=1), "clip.order"),
    ],
)
def test_a_clip_of_another_model_or_norm_is_refused_before_training(clips: Any, field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        Release(uls_plan(mechanism=Own(clips=clips)), SIZES, 1)
    assert refused.value.field == field


def test_a_clip_that_later_leaves_the_model_is_refused_before_that_rounds_charge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training(tmp_path, uls_plan())
    clips = iter([Clip(norm=1.0), Clip(norm=1.0, scales={"nobody": 1.0})])
    monkeypatch.setattr(GaussianNoise, "clip", lambda self, norm: next(clips))
    with pytest.raises(InvalidInput, match=r"clip\.scales"):
        run.run()
    assert len(run.budget.ledger) == 1


def test_a_moving_clip_norm_needs_plain_gaussian_noise() -> None:
    moving: dict[str, Any] = {"clip_quantile": 0.5, "clip_count_std": 2.0, "noise_multiplier": 1.0}
    Release(uls_plan(mechanism=Own(), **moving), SIZES, 1)
    with pytest.raises(InvalidInput, match="clip-quantile"):
        uls_plan(mechanism=Own(own_event=Gaussian(noise_multiplier=1.0)), **moving)
    with pytest.raises(InvalidInput, match="clip-quantile"):
        Release(uls_plan(mechanism=Own(own_sigma=1.0), **moving), SIZES, 1)


def test_a_noises_state_can_have_any_names() -> None:
    release = Release(uls_plan(mechanism=Own(), clip_norm=3.0), SIZES, 1)
    release.noise.kept = np.arange(4.0)  # type: ignore[attr-defined]
    again = Release(dataclasses.replace(release.plan, clip_norm=1.0), SIZES, 1)
    again.load_state(release.state())
    assert again.clip_norm == 3.0
    np.testing.assert_array_equal(again.noise.kept, np.arange(4.0))  # type: ignore[attr-defined]
