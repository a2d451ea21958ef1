"""Broken builds in which users do not wait for their turns, or correlated noise is not what hides their sums."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
from builds import BANDS, BUFFERS, ELS, TURNS, build

from fedsim.plan import ElsPlan
from fedsim.privacy.events import Event, PoissonSubsampledGaussian
from fedsim.privacy.mechanisms.banded.blt import BufferedToeplitz
from fedsim.privacy.mechanisms.banded.filter import GridFilter, NoiseFilter
from fedsim.release import Release, ReleaseLog
from fedsim.sampling import CyclicPoisson, Poisson, Population, Turns
from server.round import Round

caught = partial(build, attacked=False)
"""What a promise tells."""

# Turns ------------------------------------------------------------------------------------------------------------


@caught("examples take turns, not users", "a user was in rounds 1 apart", *ELS, *BANDS)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ElsPlan, "population_of", lambda self, users, seed: Population.of_users(self.num_examples))


@caught("every round draws from all users", "a user was in rounds 1 apart", *BANDS)
def _(patch: pytest.MonkeyPatch) -> None:
    def from_all(self: CyclicPoisson, population: Population, probability: float, *place: Any) -> np.ndarray:
        return Poisson().draw(population, self.groups * probability, *place)

    patch.setattr(CyclicPoisson, "draw", from_all)


@caught("one turn fewer than bands", "a user was in rounds 2 apart", *BANDS)
def _(patch: pytest.MonkeyPatch) -> None:
    draw = CyclicPoisson.draw
    patch.setattr(
        CyclicPoisson, "draw", lambda self, *rest: draw(dataclasses.replace(self, groups=self.groups - 1), *rest)
    )


@caught(
    "turns that a user is in, accounted as if everybody were in them",
    "units a round were sampled, not",
    *BANDS,
    attacked=False,
)
def _(patch: pytest.MonkeyPatch) -> None:
    def averaged(self: CyclicPoisson, *, probability: float, noise_multiplier: float, **rest: Any) -> Event:
        return PoissonSubsampledGaussian(sampling_probability=probability, noise_multiplier=noise_multiplier)

    patch.setattr(CyclicPoisson, "event", averaged)


@caught("all take part in every turn", "a user was in rounds 1 apart", *TURNS)
def _(patch: pytest.MonkeyPatch) -> None:
    def everybody(self: Turns, population: Population, *place: Any) -> np.ndarray:
        return np.arange(population.size)

    patch.setattr(Turns, "draw", everybody)


# Noise ------------------------------------------------------------------------------------------------------------


@caught("noise with buffers, no stronger than independent noise", "of the standard deviation", *BUFFERS)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BufferedToeplitz, "norm", lambda self, separation, turns: 1.0)


@build("correlated noise at σ alone", "of the standard deviation that is accounted", *ELS, *BANDS)
def _(patch: pytest.MonkeyPatch) -> None:
    begin = NoiseFilter.__init__

    def unlengthened(self: NoiseFilter, *rest: Any) -> None:
        begin(self, *rest)
        self.norm = 1.0

    patch.setattr(NoiseFilter, "__init__", unlengthened)


@caught(
    "two rounds of a chain share what is fresh in them",
    "the noise of one sum shows in that of another",
    *BANDS,
    attacked=False,
)
def _(patch: pytest.MonkeyPatch) -> None:
    source = Release._source
    patch.setattr(Release, "_source", lambda self, purpose, round, *rest: source(self, purpose, round // 2, *rest))


@caught(
    "a second chain with the noise of the first",
    "the noise of one sum shows in that of another",
    *BANDS,
    attacked=False,
)
def _(patch: pytest.MonkeyPatch) -> None:
    source = Release._source
    patch.setattr(
        Release, "_source", lambda self, purpose, round, attempt, *rest: source(self, purpose, round, 0, *rest)
    )


@caught(
    "a second chain that goes on from the first",
    "the noise of rounds before it cannot be drawn again",
    *BANDS,
    attacked=False,
)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(NoiseFilter, "restart", lambda self: setattr(self, "rounds", 0))


@caught("a resumed chain that forgets its past", "did not go on as one that was not", *BANDS)
def _(patch: pytest.MonkeyPatch) -> None:
    load_state = Release.load_state

    def forgetful(self: Release, arrays: Mapping[str, np.ndarray]) -> None:
        load_state(self, arrays)
        if self.chain is not None:
            self.chain.past[:] = 0

    patch.setattr(Release, "load_state", forgetful)


@caught("a resumed chain that forgets its past, secure noise", "shows in that of another (secure noise)", *BANDS)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GridFilter, "load", lambda self, past, rounds: setattr(self, "rounds", rounds))


# Rounds that run again --------------------------------------------------------------------------------------------


@caught("a release that is not found when its round runs again", "what it released is not kept", *BANDS)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReleaseLog, "find", lambda self, chain, round: None)


@caught(
    "a repeated release that forgets its noise",
    "ended elsewhere when it ran again (secure noise)",
    *BANDS,
    attacked=False,
)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GridFilter, "take", lambda self, drawn: setattr(self, "rounds", self.rounds + 1))


@caught(
    "a round that uses its charge is charged once more",
    "that had its charge was charged again",
    *ELS,
    *BANDS,
    attacked=False,
)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Round, "_to_be_charged", lambda self, number: True)
