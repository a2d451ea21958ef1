"""The accountant far from ordinary settings: very many steps, very large and small ε and δ, events of every kind."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from experiments.account.command import Account
from experiments.account.words import in_words
from experiments.run import main
from fedsim.errors import InvalidInput
from fedsim.privacy import grid_plan
from fedsim.privacy.accountant import bounds_of, delta_bounds, epsilon_bounds
from fedsim.privacy.bounds import Bounds
from fedsim.privacy.certify import Question, certify
from fedsim.privacy.events import (
    Adjacency,
    BinomialMixtureGaussian,
    Composed,
    Event,
    FixedSizeSubsampledGaussian,
    Gaussian,
    MixtureOfGaussians,
    PoissonSubsampledGaussian,
    Repeated,
)
from fedsim.privacy.loss_cells import LossCells
from fedsim.privacy.mechanisms.laplace.event import RandomisedScaleLaplace

pytestmark = pytest.mark.filterwarnings("error")
ADD, REPLACE = Adjacency.ADD_OR_REMOVE_ONE_USER, Adjacency.REPLACE_ONE_USER


def poisson(probability: float, noise: float, steps: int) -> Repeated:
    event = PoissonSubsampledGaussian(sampling_probability=probability, noise_multiplier=noise)
    return Repeated(event=event, count=steps)


def mixture(group_size: int, probability: float, noise: float, steps: int) -> Repeated:
    event = BinomialMixtureGaussian(group_size=group_size, sampling_probability=probability, noise_multiplier=noise)
    return Repeated(event=event, count=steps)


def fixed(cohort: int, population: int, noise: float, steps: int) -> Repeated:
    event = FixedSizeSubsampledGaussian(cohort_size=cohort, population_size=population, noise_multiplier=noise)
    return Repeated(event=event, count=steps)


def drawn(generator: np.random.Generator, noise: float, steps: int, *, laplace: bool) -> Event:
    """An event of a random kind."""

    def between(low: float, high: float) -> float:
        return float(10 ** generator.uniform(low, high))

    kind = generator.integers(7)
    if kind == 0:
        return poisson(between(-6, 0), noise, steps)
    if kind == 1:
        return mixture(int(between(0, 2)), between(-4, 0), noise, steps)
    if kind == 2:
        cohort = int(between(0, 3))
        return fixed(cohort, int(cohort * between(0, 4)) + 1, noise, steps)
    if kind == 3:
        shares = generator.dirichlet(np.ones(4))
        sizes = tuple(generator.uniform(0, 3, 4))
        return Repeated(
            event=MixtureOfGaussians(sensitivities=sizes, probabilities=tuple(shares), noise_multiplier=noise),
            count=steps,
        )
    if kind == 4 and laplace:
        law = (("gamma", 0.6, between(-0.5, 1), between(-2, 0.3) / noise), ("point", 0.4, 1 / noise, 0.0))
        event = RandomisedScaleLaplace(law=law, sampling_probability=between(-3, 0), group_size=int(between(0, 0.5)))
        return Repeated(event=event, count=min(steps, 10**5))
    if kind == 5:
        parts = [drawn(generator, noise * between(-1, 1), max(steps // 10, 1), laplace=laplace) for _ in range(2)]
        return Composed(events=tuple(parts))
    return Repeated(event=Gaussian(noise_multiplier=noise), count=steps)


@pytest.mark.parametrize("seed", range(30))
def test_every_epsilon_is_finite_and_says_how_close_it_is(seed: int) -> None:
    """T to 1e7, σ from 1e-3 to 1e3, δ from 1e-2 to 1e-18; and more steps, less δ or less noise never cost less.

    Each seed asks one of these three in turn: a question of 10⁷ steps takes up to 20 s.
    """
    generator = np.random.default_rng(seed)
    adjacency = (ADD, REPLACE)[seed % 2]
    noise, steps = float(10 ** generator.uniform(-3, 3)), int(10 ** generator.uniform(0, 7))
    delta = float(10 ** generator.uniform(-18, -2))

    def bounds(noise: float, steps: int, delta: float) -> Bounds:
        event = drawn(np.random.default_rng(1000 + seed), noise, steps, laplace=adjacency is ADD)
        return epsilon_bounds(event, delta, adjacency=adjacency)

    found = bounds(noise, steps, delta)
    assert 0 <= found.lower <= found.upper < math.inf
    assert found.met == (found.gap <= 1e-3)
    costlier = [(noise / 1.5, steps, delta), (noise, 2 * steps, delta), (noise, steps, delta / 10)][seed % 3]
    assert found.lower <= bounds(*costlier).upper < math.inf


HARD = [
    (poisson(0.01, 100.0, 10**6), 1e-5, ADD),
    (poisson(0.01, 100.0, 10**7), 1e-5, ADD),
    (poisson(0.001, 10.0, 10**7), 1e-18, REPLACE),
    (fixed(10, 1000, 50.0, 10**6), 1e-5, ADD),
    (fixed(10, 1000, 50.0, 10**6), 1e-5, REPLACE),
    (mixture(512, 0.57, 1.0, 29), 1e-5, ADD),
    (mixture(512, 0.57, 1.0, 29), 1e-5, REPLACE),
    (poisson(0.5, 1e-3, 1), 1e-5, ADD),
    (poisson(0.5, 1e-3, 100), 1e-5, ADD),
    (poisson(1e-3, 1e-3, 10), 1e-9, REPLACE),
    (Composed(events=(poisson(0.01, 100.0, 10**6), mixture(20, 0.57, 0.1, 1))), 1e-5, ADD),
]


@pytest.mark.parametrize(("event", "delta", "adjacency"), HARD)
def test_what_used_to_be_unbounded_now_meets_the_tolerance(event: Event, delta: float, adjacency: Adjacency) -> None:
    found = epsilon_bounds(event, delta, adjacency=adjacency)
    assert found.met
    assert 0 < found.lower <= found.upper < math.inf
    assert found.gap <= 1e-3


@pytest.mark.parametrize(
    ("noise", "steps", "delta"),
    [
        (100.0, 10**6, 1e-5),
        (3e3, 10**7, 1e-5),
        (1e5, 10**7, 1e-6),
        (1e4, 10**7, 1e-18),
        (20.0, 10**7, 1e-9),
        (1e-2, 100, 1e-5),
        (1e-3, 1, 1e-18),
        (1e-3, 1000, 1e-2),
    ],
)
@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_the_grid_agrees_with_the_closed_gaussian_at_any_size(
    noise: float, steps: int, delta: float, adjacency: Adjacency
) -> None:
    """A sampling probability a hair below 1 goes through the grid, and through blocks of releases."""
    if noise < 1 and adjacency is REPLACE:
        pytest.skip("so far apart, a user who is absent once in 1e15 steps is the likelier story")
    closed = epsilon_bounds(poisson(1.0, noise, steps), delta, adjacency=adjacency)
    found = epsilon_bounds(poisson(1 - 1e-15, noise, steps), delta, adjacency=adjacency)
    assert found.met
    assert found.lower <= closed.upper * (1 + 1e-9)
    assert closed.lower * (1 - 1e-9) <= found.upper


BLOCKED = [
    (poisson(0.01, 1.0, 1000), 1e-5, ADD),
    (poisson(0.1, 5.0, 777), 1e-8, REPLACE),
    (mixture(8, 0.02, 3.0, 1000), 1e-6, ADD),
    (fixed(10, 100, 8.0, 1501), 1e-6, REPLACE),
    (Composed(events=(poisson(0.01, 4.0, 3000), mixture(3, 0.05, 20.0, 900), poisson(1.0, 30.0, 7))), 1e-6, ADD),
    (
        Repeated(event=RandomisedScaleLaplace(law=(("gamma", 1.0, 2.0, 0.05),), sampling_probability=0.2), count=2000),
        1e-6,
        ADD,
    ),
]


@pytest.mark.parametrize(("event", "delta", "adjacency"), BLOCKED)
def test_blocks_of_releases_stay_on_their_side(
    event: Event, delta: float, adjacency: Adjacency, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = epsilon_bounds(event, delta, adjacency=adjacency, tolerance=5e-5)
    bounds_of.cache_clear()
    monkeypatch.setattr(grid_plan, "SHORT_WINDOW", 2**9)
    monkeypatch.setattr(grid_plan, "BLOCKED_WINDOW", 2**9)
    used = []
    coarsened = grid_plan.coarsened
    monkeypatch.setattr(
        grid_plan, "coarsened", lambda *given, **named: used.append(given[3]) or coarsened(*given, **named)
    )
    for tolerance in (0.1, 1e-2, 1e-3):
        found = epsilon_bounds(event, delta, adjacency=adjacency, tolerance=tolerance)
        assert found.lower <= close.upper
        assert close.lower <= found.upper
        assert found.gap < 0.2
    assert max(used) >= 4, "blocks were composed"


@dataclass(frozen=True)
class Leaky:
    """With probability 0.1 under P the outcome tells everything; else it is a coin that is biased by e."""

    symmetric: bool = False
    least_loss: float = -math.inf

    def loss_range(self, tail: float) -> tuple[float, float]:
        return -2.0, 2.0

    def cells(self, edges: np.ndarray) -> LossCells:
        place = np.searchsorted(edges, np.log([0.9 * 0.5 / 0.6, 0.9 * 0.5 / 0.4]))
        p, q = np.zeros(len(edges) + 1), np.zeros(len(edges) + 1)
        np.add.at(p, place, 0.45)
        np.add.at(q, place, [0.6, 0.4])
        p[-1] += 0.1
        return LossCells(edges, p, q, 1e-16 * p, 1e-16 * q, 1e-15)


def test_only_an_infinite_loss_leaves_epsilon_infinite() -> None:
    pairs = [(Leaky(), 2)]
    assert certify(pairs, Question(None, 0.18, 1e-3), swapped=False).upper == math.inf
    found = certify(pairs, Question(None, 0.2, 1e-3), swapped=False)
    assert 0.18 < found.upper < 0.19


def test_a_missed_tolerance_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Rare and heavy: one participation in a million steps, hardly any noise."""
    assert not epsilon_bounds(poisson(1e-6, 0.5, 10**6), 1e-9).met
    plan = Account(sampling_probability=1e-6, noise_multiplier=0.5, steps=10**6, delta=1e-9)
    result = plan.result()
    assert result["tolerance"]["met"] is False
    assert result["tolerance"]["gap"] > result["tolerance"]["asked"] == 1e-3
    assert "the tolerance of 0.001 is missed" in in_words(result)
    close = replace(plan, noise_multiplier=5.0, sampling_probability=0.01).result()
    assert close["tolerance"]["met"] is True
    assert "missed" not in in_words(close)
    unbounded = result | {"epsilon": {"upper": None, "lower": 0.5}}
    assert "could not be bounded" in in_words(unbounded)
    assert "not bounded" not in in_words(unbounded)


def test_bounds_know_whether_they_meet_what_was_asked() -> None:
    assert Bounds(lower=0.9, upper=1.0, tolerance=0.2).met
    assert not Bounds(lower=0.9, upper=1.0, tolerance=1e-3).met
    assert not Bounds(lower=0.0, upper=math.inf, tolerance=0.5).met
    assert Bounds(lower=0.0, upper=0.0, tolerance=1e-3).met
    assert epsilon_bounds(Gaussian(noise_multiplier=1.0), 1e-5, tolerance=0.05).tolerance == 0.05


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("--sampling-probability 0.01 --steps 10000000", "noise-multiplier"),
        ("--noise-multiplier 100 --steps 10000000", "sampling-probability"),
        ("--noise-multiplier 100 --sampling-probability 0.01", "steps"),
        ("--algorithm els --noise-multiplier 400 --sampling-probability 0.001 --steps 10000000", "group-size"),
        ("--sampling fixed-size --cohort-size 5 --population-size 1000 --steps 10000000", "noise-multiplier"),
        ("--algorithm els --group-size 512 --sampling-probability 0.57 --steps 29", "noise-multiplier"),
    ],
)
def test_a_target_is_met_with_very_many_steps(options: str, found: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["account", "--target-epsilon", "1", *options.split()]) == 0
    shown = capsys.readouterr().out
    assert "user-level ε ≤ " in shown
    assert f"found: {found} = " in shown
    assert "missed" not in shown


@pytest.mark.parametrize(
    "options",
    [
        "--noise-multiplier 0.01 --sampling-probability 0.5",
        "--algorithm els --group-size 512 --noise-multiplier 400 --sampling-probability 0.57",
        "--algorithm els --group-size 700 --noise-multiplier 0.01 --sampling-probability 0.5",
    ],
)
def test_an_impossible_target_names_one_that_is_possible(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["account", "--target-epsilon", "1", *options.split()]) == 2
    error = capsys.readouterr().err
    assert "target-epsilon is 1.0" in error
    possible = error.split("must be at least ")[1].split(",")[0]
    assert float(possible) > 1
    assert main(["account", "--target-epsilon", possible, *options.split()]) == 0


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("noise", [1e-3, 0.3, 50.0])
def test_delta_is_a_probability_at_any_epsilon(epsilon: float, noise: float) -> None:
    for event in (poisson(0.05, noise, 30), fixed(3, 50, noise, 3), mixture(5, 0.1, noise, 100)):
        found = delta_bounds(event, epsilon)
        assert 0 <= found.lower <= found.upper <= 1


def test_no_noise_up_to_the_largest_is_refused_with_what_it_has() -> None:
    from fedsim.privacy.calibration import calibrate_noise_multiplier

    with pytest.raises(InvalidInput, match=r"at least .* certified to have"):
        calibrate_noise_multiplier(lambda noise: Gaussian(noise_multiplier=1.0), epsilon=0.1, delta=1e-5)
