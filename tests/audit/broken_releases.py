"""Broken builds that sample, noise, release, charge or account otherwise than the plan says."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from builds import ELS, QUANTILE, build, mechanism

from fedsim.clip import Clip
from fedsim.engine.messages import TrainRequest
from fedsim.plan import ElsPlan, Plan
from fedsim.privacy.mechanisms import GaussianNoise, QuantileClip
from fedsim.privacy.mechanisms.adaptive_noise import AdaptiveGaussianNoise
from fedsim.privacy.mechanisms.laplace.mechanism import LaplaceNoise
from fedsim.randomness import StreamNoise
from fedsim.release import Release
from fedsim.sampling import Poisson, Population, TruncatedPoisson
from fedsim.secure_noise import SecureNoise
from server.round import Budget, Round

# Sampling ---------------------------------------------------------------------------------------------------------


@build("every round samples the first one's cohort", "two rounds had more units in common")
def _(patch: pytest.MonkeyPatch) -> None:
    sample = Plan.sample
    patch.setattr(Plan, "sample", lambda self, round, *rest: sample(self, 0, *rest))


@build("rounds sample in pairs", "two rounds had more units in common", *ELS)
def _(patch: pytest.MonkeyPatch) -> None:
    sample = Plan.sample
    patch.setattr(Plan, "sample", lambda self, round, *rest: sample(self, round // 2, *rest))


@build("a round that was lost samples the same again", "two rounds had more units in common")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Round, "_attempt", lambda self, number: 0)


@build("sampling with twice the probability", "units a round were sampled, not 10")
def _(patch: pytest.MonkeyPatch) -> None:
    draw = Poisson.draw
    patch.setattr(Poisson, "draw", lambda self, population, p, *rest: draw(self, population, min(1.0, 2 * p), *rest))


@build("one unit that is always sampled", "of 100 rounds at probability 0.25")
def _(patch: pytest.MonkeyPatch) -> None:
    draw = Poisson.draw
    patch.setattr(
        Poisson,
        "draw",
        lambda self, units, *rest: np.union1d(draw(self, units, *rest), [units.size - 1]),
    )


CAPPED = ("--plan.sampling", "truncated-poisson", "--plan.sampling-options", "most-units=8")


@build("a cap that keeps those who came first", "were of the first half of all", *CAPPED)
def _(patch: pytest.MonkeyPatch) -> None:
    draw = Poisson.draw
    patch.setattr(
        TruncatedPoisson,
        "draw",
        lambda self, *arguments: draw(Poisson(), *arguments)[: self.cap(arguments[0].size, arguments[1])],
    )


@build("a cap that is only accounted", "units, above its cap of 8", *CAPPED)
def _(patch: pytest.MonkeyPatch) -> None:
    draw = Poisson.draw
    patch.setattr(TruncatedPoisson, "draw", lambda self, *arguments: draw(Poisson(), *arguments))


@build("rounds drawn again until they are within the cap", "rounds were at their cap", *CAPPED)
def _(patch: pytest.MonkeyPatch) -> None:
    draw = Poisson.draw

    def again(
        self: TruncatedPoisson, population: Population, probability: float, round: int, streams: Any
    ) -> np.ndarray:
        generator = streams(round)
        while True:
            drawn = draw(Poisson(), population, probability, round, lambda *_: generator)
            if len(drawn) <= self.cap(population.size, probability):
                return drawn

    patch.setattr(TruncatedPoisson, "draw", again)


@build("a cap that is accounted as plain Poisson sampling", "units a round were sampled, not 10")
def _(patch: pytest.MonkeyPatch) -> None:
    draw = TruncatedPoisson.draw
    patch.setattr(Poisson, "draw", lambda self, *arguments: draw(TruncatedPoisson(most_units=8), *arguments))


# Noise ------------------------------------------------------------------------------------------------------------


def _quieter(self: GaussianNoise, total: np.ndarray, clip: Clip, source: Any) -> None:
    GAUSSIAN_ADD(self, total, dataclasses.replace(clip, norm=clip.norm / 2), source)


GAUSSIAN_ADD = GaussianNoise.add


@build("noise at half the claimed σ", "of the standard deviation that is accounted")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GaussianNoise, "add", _quieter)


@build("a plan that asks for half the noise it is accounted with", "of the standard deviation that is accounted", *ELS)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Plan, "sum_noise_multiplier", property(lambda self: self.noise_multiplier / 2))


@build("Laplace noise of half the scale", "of the standard deviation that is acc", *mechanism("randomised-laplace"))
def _(patch: pytest.MonkeyPatch) -> None:
    add = LaplaceNoise.add
    patch.setattr(
        LaplaceNoise,
        "add",
        lambda self, total, clip, source: add(self, total, dataclasses.replace(clip, norm=clip.norm / 2), source),
    )


@build("secure noise at half σ", "of the standard deviation that is accounted (secure noise)")
def _(patch: pytest.MonkeyPatch) -> None:
    add = SecureNoise.add_normal
    patch.setattr(SecureNoise, "add_normal", lambda self, total, std: add(self, total, std / 2))


@build("noise left out", "some values got no noise")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GaussianNoise, "add", lambda self, total, clip, source: None)


@build("noise reused for two sums", "the noise of one sum shows in that of another")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Release, "_source", lambda self, purpose, *_: StreamNoise(self._noise_seed or 0, purpose))


@build("noise without the scales of the clip", "of the standard deviation", *mechanism("matrix-noise"))
def _(patch: pytest.MonkeyPatch) -> None:
    def unwhitened(self: GaussianNoise, total: np.ndarray, clip: Clip, source: Any) -> None:
        source.add_normal(total, self.noise_multiplier * clip.norm)

    patch.setattr(GaussianNoise, "add", unwhitened)


@build("noise at the clip norm of the round before", "noise has", *QUANTILE)
def _(patch: pytest.MonkeyPatch) -> None:
    mean, before = Release.noised_mean, {}

    def stale(self: Release, total: np.ndarray, clip: Clip, *rest: Any, **options: Any) -> np.ndarray:
        previous, before[id(self)] = before.get(id(self), clip), clip
        return mean(self, total, previous, *rest, **options)

    patch.setattr(Release, "noised_mean", stale)


# The rest of the release ------------------------------------------------------------------------------------------


@build("division by the realised cohort", "not sampled put something in")
def _(patch: pytest.MonkeyPatch) -> None:
    run, mean, realised = Round.run, Release.noised_mean, {}

    def counted(self: Round, number: int, gather: Any) -> dict[str, float]:
        def gathered(request: TrainRequest, *rest: Any, **following: Any) -> Any:
            realised[id(self.release)] = max(len(request.units), 1)
            return gather(request, *rest, **following)

        return run(self, number, gathered)

    def divided(self: Release, *arguments: Any, **options: Any) -> np.ndarray:
        return mean(self, *arguments, **options) * self.plan.normaliser / realised[id(self)]

    patch.setattr(Round, "run", counted)
    patch.setattr(Release, "noised_mean", divided)


@build("the count released without noise", "the count's noise has 0 of", *QUANTILE)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        QuantileClip, "noised_fraction",
        lambda self, below, units, source, private: 0.5 + (below - units / 2) / self.expected_units,
    )  # fmt: skip


@build("a count in which every unit is two", "moved the count by", *QUANTILE)
def _(patch: pytest.MonkeyPatch) -> None:
    fraction = QuantileClip.noised_fraction
    patch.setattr(
        QuantileClip, "noised_fraction",
        lambda self, below, units, source, private: fraction(self, 2 * below, 2 * units, source, private=private),
    )  # fmt: skip


@build("the count's noise is the sum's", "the noise of the count shows in that of the sum", *QUANTILE)
def _(patch: pytest.MonkeyPatch) -> None:
    source = Release._source

    def shared(self: Release, purpose: str, *place: Any) -> Any:
        # As float64 and float32 of one generator would be only alike, one float64 normal is drawn for both.
        return source(self, "noise", *place)

    patch.setattr(Release, "_source", shared)
    patch.setattr(StreamNoise, "add_normal", _of_float64)


def _of_float64(self: StreamNoise, total: np.ndarray, std: float) -> None:
    total += std * self.generator().standard_normal(len(total))


@build("scales that follow the sum without its noise", "something that was not released", *mechanism("adaptive-noise"))
def _(patch: pytest.MonkeyPatch) -> None:
    mean, observe, sums = Release.noised_mean, AdaptiveGaussianNoise.observe, []

    def noted(self: Release, total: np.ndarray, *rest: Any, **options: Any) -> np.ndarray:
        sums.append((self.noise, total / self.plan.normaliser))
        return mean(self, total, *rest, **options)

    def peeking(self: AdaptiveGaussianNoise, released: np.ndarray, parameters: np.ndarray) -> None:
        known = [mean for noise, mean in sums if noise is self]
        observe(self, known[-1] if known else released, parameters)

    patch.setattr(Release, "noised_mean", noted)
    patch.setattr(AdaptiveGaussianNoise, "observe", peeking)


# Charges ----------------------------------------------------------------------------------------------------------


@build("the charge is written after gathering", "asked for without being charged")
def _(patch: pytest.MonkeyPatch) -> None:
    run, charge = Round.run, Budget.charge

    def late(self: Round, number: int, gather: Any) -> dict[str, float]:
        def gathered(*arguments: Any, **options: Any) -> Any:
            result = gather(*arguments, **options)
            charge(self.budget, number)
            return result

        return run(self, number, gathered)

    patch.setattr(Budget, "charge", lambda self, round: None)
    patch.setattr(Round, "run", late)


@build("a round that runs again is not charged again", "asked for without being charged")
def _(patch: pytest.MonkeyPatch) -> None:
    charge = Budget.charge
    patch.setattr(Budget, "charge", lambda self, round: None if self.attempts(round) else charge(self, round))


# Accounting -------------------------------------------------------------------------------------------------------


@build("a user's examples accounted as one", "one release, canary always sampled", *ELS, "--plan.group-size", "8")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ElsPlan, "units_in_group", classmethod(lambda cls, group_size: None))


@build("accounted at a tenth of the sampling", "units a round were sampled, not 1")
def _(patch: pytest.MonkeyPatch) -> None:
    event = Poisson.event
    patch.setattr(
        Poisson, "event", lambda self, *, probability, **options: event(self, probability=probability / 10, **options)
    )


@build("updates clipped in L2, accounted in L1", "clip.order is 2; it must be 1", *mechanism("randomised-laplace"))
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LaplaceNoise, "clip", lambda self, norm: Clip(norm=norm, order=2))
