"""Poisson sampling with a cap: the pair against every outcome of small rounds, and against other accountants."""

import math
from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from numpy.typing import NDArray
from scipy import stats
from scipy.special import ndtr

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import delta_bounds, epsilon_bounds
from fedsim.privacy.calibration import calibrate_noise_multiplier
from fedsim.privacy.check import Verdict, confirm
from fedsim.privacy.dominating_pairs import dominating_pair
from fedsim.privacy.events import (
    Adjacency,
    FixedSizeSubsampledGaussian,
    Gaussian,
    PoissonSubsampledGaussian,
    Repeated,
    TruncatedPoissonSubsampledGaussian,
)
from fedsim.privacy.gaussian_pairs import GaussianPair
from fedsim.privacy.loss_cells import dominating_measure
from fedsim.privacy.truncation import Binomial, truncation

Floats = NDArray[np.float64]
ADD, REPLACE = Adjacency.ADD_OR_REMOVE_ONE_USER, Adjacency.REPLACE_ONE_USER
EPSILONS = (0.0, 0.05, 0.3, 1.0, 2.5)


def truncated(q: float, users: int, cap: int, noise: float) -> TruncatedPoissonSubsampledGaussian:
    return TruncatedPoissonSubsampledGaussian(
        sampling_probability=q, population_size=users, most_units=cap, noise_multiplier=noise
    )


def capped(q: float, users: int, cap: int, noise: float, steps: int) -> Repeated:
    return Repeated(event=truncated(q, users, cap, noise), count=steps)


def poisson(q: float, noise: float, steps: int) -> Repeated:
    return Repeated(event=PoissonSubsampledGaussian(sampling_probability=q, noise_multiplier=noise), count=steps)


# Every outcome of small rounds ------------------------------------------------------------------------------------


Mixture = tuple[Floats, Floats]
"""Means and weights of what is released."""


def released(contributions: Floats, q: float, cap: int) -> Mixture:
    """The sum's law before the noise: every set that may join, every subset of it that may stay."""
    n, means, weights = len(contributions), [], []
    for kept in range(min(n, cap) + 1):
        # Every set of `kept` users is as likely as every other.
        sizes = range(kept, n + 1) if kept == cap else [kept]
        share = sum(math.comb(n, size) * q**size * (1 - q) ** (n - size) for size in sizes)
        for chosen in combinations(range(n), kept):
            means.append(contributions[list(chosen)].sum())
            weights.append(share / math.comb(n, kept))
    return np.array(means), np.array(weights)


def density(law: Mixture, noise: float, x: Floats) -> Floats:
    means, weights = law
    z = (x[:, None] - means) / noise
    return np.exp(-z * z / 2) @ weights / (noise * math.sqrt(2 * math.pi))


def hockey_sticks(p: Mixture, q: Mixture, noise: float, epsilons: Sequence[float] = EPSILONS) -> list[float]:
    """δ of two mixtures, from their distribution functions between the points where the densities cross."""
    reach = max(np.abs(p[0]).max(), np.abs(q[0]).max()) + 9 * noise
    x = np.linspace(-reach, reach, 1501)
    densities, found = [density(law, noise, x) for law in (p, q)], []
    for epsilon in epsilons:
        gap = densities[0] - math.exp(epsilon) * densities[1]
        turns = np.flatnonzero(np.diff(np.sign(gap)))
        roots = x[turns] - gap[turns] * (x[1] - x[0]) / (gap[turns + 1] - gap[turns])
        edges = np.concatenate([[-np.inf], roots, [np.inf]])
        below = [ndtr((edges[:, None] - means) / noise) @ weights for means, weights in (p, q)]
        found.append(float(np.maximum(np.diff(below[0]) - math.exp(epsilon) * np.diff(below[1]), 0).sum()))
    return found


def claimed(event: TruncatedPoissonSubsampledGaussian, adjacency: Adjacency, *, swapped: bool) -> list[float]:
    """δ at EPSILONS in one direction, from above, by the pair's measure."""
    cells = dominating_pair(event, adjacency).cells(np.linspace(-30, 30, 6001))
    measure = dominating_measure(cells.swapped() if swapped else cells)
    masses, losses = np.exp(measure.log_masses), measure.losses + measure.shift
    found = [masses @ np.maximum(-np.expm1(np.minimum(epsilon - losses, 0)), 0) for epsilon in EPSILONS]
    return [float(value) + measure.infinite for value in found]


def small_round(seed: int) -> tuple[int, float, int, float, Floats]:
    """Users, q, cap, noise, and contributions of one user more: the first is he who goes, comes or changes."""
    draw = np.random.default_rng(seed)
    users = int(draw.integers(1, 6))
    contributions = np.where(draw.random() < 0.5, draw.choice([-1.0, 1.0], users + 1), draw.uniform(-1, 1, users + 1))
    if draw.random() < 0.4:  # what the pair fears: all the others against the one
        contributions = np.append(1.0, np.full(users, -1.0))
    q = float(draw.choice([0.05, 0.3, 0.7, 0.95, 1.0]))
    return users, q, int(draw.integers(1, users + 2)), float(draw.choice([0.3, 0.7, 1.5])), contributions


@pytest.mark.parametrize("first", range(0, 120, 30))
def test_no_round_of_few_users_loses_more_than_the_pair(first: int) -> None:
    """The user removed from N, added to N, and replaced among N; both directions; every ε."""
    tightest = 0.0
    for seed in range(first, first + 30):
        users, q, cap, noise, contributions = small_round(seed)
        event = truncated(q, users, cap, noise)
        changed = np.append(-contributions[0], contributions[1:-1])
        added, present, absent, others, replaced = (
            released(part, q, cap)
            for part in (contributions, contributions[:-1], contributions[1:-1], contributions[1:], changed)
        )
        pairs = [
            (ADD, present, absent),
            (ADD, added, others),
            (REPLACE, present, replaced),
        ]
        for adjacency, with_user, other in pairs:
            for swapped in (False, True):
                bound = claimed(event, adjacency, swapped=swapped)
                true = hockey_sticks(*((other, with_user) if swapped else (with_user, other)), noise)
                for epsilon, found, most in zip(EPSILONS, true, bound, strict=True):
                    assert found <= most + 1e-9, (seed, adjacency, swapped, epsilon)
                    tightest = max(tightest, found / most if most > 1e-6 else 0.0)
    assert tightest > 0.9, "where nothing is cut the pair is attained"


@pytest.mark.parametrize(
    ("users", "q", "cap", "noise"), [(2, 0.5, 1, 0.8), (3, 0.7, 2, 1.0), (4, 0.3, 1, 1.5), (3, 1.0, 2, 1.2)]
)
def test_two_rounds_lose_no_more_than_the_pair_twice(users: int, q: float, cap: int, noise: float) -> None:
    x = np.linspace(-users - 1 - 7 * noise, users + 1 + 7 * noise, 901)
    contributions = np.append(1.0, np.full(users, -1.0))
    for size in (users, users + 1):
        laws = [released(part, q, cap) for part in (contributions[:size], contributions[1:size])]
        p, other = (density(law, noise, x) * (x[1] - x[0]) for law in laws)
        twice, others = np.multiply.outer(p, p), np.multiply.outer(other, other)
        for epsilon in (0.2, 1.0, 3.0):
            most = delta_bounds(capped(q, users, cap, noise, 2), epsilon).upper
            for one, two in ((twice, others), (others, twice)):
                assert np.maximum(one - np.exp(epsilon) * two, 0).sum() <= most + 1e-5


def of_one_size(users: int, q: float, cap: int, noise: float, epsilon: float) -> float:
    """The bound for N users against N − 1 alone, remove direction, in closed form."""
    tau = stats.binom.sf(cap - 1, users - 1, q)
    chance = cap / users * stats.binom.sf(cap, users, q) / tau if tau else 0.0

    def removed(share: float, shift: float) -> float:
        rest = np.expm1(epsilon) / share + 1
        edge = shift / 2 + np.log(rest) / shift
        return float(share * (stats.norm.sf(edge - shift) - rest * stats.norm.sf(edge)))

    second = removed(chance, 2 / noise) if chance else 0.0
    return float((1 - tau) * removed(q, 1 / noise) + tau * second)


@pytest.mark.parametrize(("users", "q", "cap", "noise", "epsilon"), [(1, 0.3, 1, 1.0, 3.0), (3, 0.95, 3, 1.0, 1.0)])
def test_the_bound_of_n_users_alone_does_not_cover_one_who_is_added(
    users: int, q: float, cap: int, noise: float, epsilon: float
) -> None:
    """Why the pair counts N + 1 as well: with N = B nothing is ever cut, with one user more it is."""
    contributions = np.append(1.0, np.full(users, -1.0))
    laws = (released(part, q, cap) for part in (contributions, contributions[1:]))
    (true,) = hockey_sticks(*laws, noise, [epsilon])
    assert of_one_size(users, q, cap, noise, epsilon) < 0.8 * true
    assert true <= of_one_size(users + 1, q, cap, noise, epsilon)
    assert true <= delta_bounds(truncated(q, users, cap, noise), epsilon).upper


@pytest.mark.parametrize("adjacency", Adjacency)
def test_every_rounding_makes_the_pair_worse(adjacency: Adjacency, monkeypatch: pytest.MonkeyPatch) -> None:
    """Share moved as rounding moves it, and a larger chance, raise δ in both directions at every ε."""
    event = truncated(0.3, 20, 6, 0.8)
    plain = truncation(20, 0.3, 6, grows=adjacency.accounted_as is ADD)
    some = 0.05
    worse = [
        {"untouched": plain.untouched - some, "doubtful": plain.doubtful + some},
        {"displacing": plain.displacing - some, "doubtful": plain.doubtful + some},
        {"chance": plain.chance + 0.02},
    ]
    for swapped in (False, True):
        before = claimed(event, adjacency, swapped=swapped)
        for change in worse:
            moved = type(plain)(**{**vars(plain), **change})
            with monkeypatch.context() as patch:
                patch.setattr("fedsim.privacy.dominating_pairs.truncation", lambda *_, moved=moved, **__: moved)
                after = claimed(event, adjacency, swapped=swapped)
            assert all(new >= old * (1 - 1e-7) for new, old in zip(after, before, strict=True)), change
            assert after[0] > before[0] * (1 + 1e-6)


# Other accountants, and limits ------------------------------------------------------------------------------------


def theirs(q: float, users: int, cap: int, noise: float, adjacency: Adjacency) -> pld.PrivacyLossDistribution:
    relation = pld.NeighborRel.REPLACE_ONE if adjacency is REPLACE else pld.NeighborRel.ADD_OR_REMOVE_ONE
    return pld.from_truncated_subsampled_gaussian_mechanism(
        users, q, cap, noise, value_discretization_interval=1e-3, neighboring_relation=relation
    )


@pytest.mark.parametrize("adjacency", Adjacency)
@pytest.mark.parametrize(
    ("users", "q", "cap", "noise", "steps"), [(1000, 0.05, 80, 1.0, 100), (1000, 0.1, 105, 2.0, 20)]
)
def test_dp_accounting_is_above_and_close_where_hardly_any_round_is_cut(
    users: int, q: float, cap: int, noise: float, steps: int, adjacency: Adjacency
) -> None:
    """Its second pair is that of replacing a user, which is looser."""
    sizes = (users, users + 1) if adjacency is ADD else (users,)
    most = max(theirs(q, n, cap, noise, adjacency).self_compose(steps).get_epsilon_for_delta(1e-5) for n in sizes)
    found = epsilon_bounds(capped(q, users, cap, noise, steps), 1e-5, adjacency=adjacency)
    assert found.met
    assert found.lower <= most * 1.001
    assert found.upper >= most * (0.995 if cap == 80 else 0.8)


@pytest.mark.parametrize(
    ("q", "cap", "noise", "steps"), [(0.05, 60, 1.0, 100), (0.05, 20, 1.5, 50), (0.4, 380, 3.0, 10)]
)
def test_the_same_pair_built_of_dp_accounting_s_parts_agrees(q: float, cap: int, noise: float, steps: int) -> None:
    users, found = 1000, epsilon_bounds(capped(q, 1000, cap, noise, steps), 1e-5)
    most = 0.0
    for n in (users, users + 1):
        tau = stats.binom.sf(cap - 1, n - 1, q)
        chance = cap / n * stats.binom.sf(cap, n, q) / tau
        first = pld.from_gaussian_mechanism(noise, sampling_prob=q, value_discretization_interval=1e-2)
        second = pld.from_mixture_gaussian_mechanism(
            noise, [0, 2], [1 - chance, chance], value_discretization_interval=1e-2
        )
        whole = second.compute_mixture(first, tau).self_compose(steps)
        most = max(most, whole.get_epsilon_for_delta(1e-5))
    assert most * 0.998 <= found.upper <= most * 1.02


@pytest.mark.parametrize("adjacency", Adjacency)
def test_a_cap_that_nobody_reaches_is_plain_poisson_sampling(adjacency: Adjacency) -> None:
    plain = epsilon_bounds(poisson(0.1, 1.0, 50), 1e-6, adjacency=adjacency)
    never = epsilon_bounds(capped(0.1, 200, 201, 1.0, 50), 1e-6, adjacency=adjacency)
    assert (never.lower, never.upper) == (plain.lower, plain.upper)
    pair = dominating_pair(truncated(0.1, 200, 201, 1.0), adjacency)
    assert isinstance(pair, GaussianPair), "so that all other accountants know it too"
    before = math.inf
    for cap in (30, 40, 60, 120, 200):
        found = epsilon_bounds(capped(0.1, 200, cap, 1.0, 50), 1e-6, adjacency=adjacency)
        assert plain.lower <= found.upper <= before * 1.001
        before = found.upper
    assert before <= plain.upper * 1.001


@pytest.mark.parametrize("adjacency", Adjacency)
def test_everybody_up_to_a_cap_is_a_cohort_of_fixed_size(adjacency: Adjacency) -> None:
    fixed = FixedSizeSubsampledGaussian(cohort_size=30, population_size=100, noise_multiplier=2.0)
    whole = epsilon_bounds(Repeated(event=fixed, count=20), 1e-5, adjacency=adjacency)
    found = epsilon_bounds(capped(1.0, 100, 30, 2.0, 20), 1e-5, adjacency=adjacency)
    assert found.upper == pytest.approx(whole.upper, rel=1e-4)
    assert found.lower == pytest.approx(whole.lower, rel=1e-4)


@pytest.mark.parametrize("adjacency", Adjacency)
@pytest.mark.parametrize("cap", [1, 2, 20, 60])
def test_more_noise_loses_less_and_a_low_cap_never_more_than_no_sampling(cap: int, adjacency: Adjacency) -> None:
    bounds = [
        epsilon_bounds(capped(0.05, 1000, cap, noise, 30), 1e-5, adjacency=adjacency) for noise in (0.8, 1, 2, 5)
    ]
    assert all(more.upper < less.lower for less, more in pairwise(bounds))
    unsampled = epsilon_bounds(Repeated(event=Gaussian(noise_multiplier=0.4), count=30), 1e-5)
    assert bounds[0].upper < unsampled.lower


def test_a_cap_that_hardly_any_round_reaches_costs_nothing() -> None:
    """The default one, of probability 1e-15, also at a small δ; at one that is often reached it costs a lot."""
    q, users, noise, steps = 1000 / 340_000, 340_000, 1.0, 2000
    rare = Binomial(users, q).least_cap(1e-15)
    for delta in (1e-6, 1e-12):
        plain, found = (
            epsilon_bounds(event, delta) for event in (poisson(q, noise, steps), capped(q, users, rare, noise, steps))
        )
        assert plain.lower <= found.upper <= plain.upper * 1.001
    assert (
        epsilon_bounds(capped(q, users, 1100, noise, steps), 1e-6).lower
        > 3 * epsilon_bounds(poisson(q, noise, steps), 1e-6).upper
    )


@pytest.mark.parametrize("adjacency", Adjacency)
@pytest.mark.parametrize("cap", [8, 40, 52, 90, 1500])
def test_the_second_method_confirms_and_contradicts(cap: int, adjacency: Adjacency) -> None:
    event = capped(0.05, 1000, cap, 1.1, 60)
    found = epsilon_bounds(event, 1e-6, adjacency=adjacency)
    assert confirm(event, 1e-6, (found.lower, found.upper), adjacency).verdict is Verdict.CONFIRMED
    wrong = confirm(event, 1e-6, (found.upper * 1.001, found.lower * 0.999), adjacency)
    assert (wrong.lower.verdict, wrong.upper.verdict) == (Verdict.CONTRADICTED, Verdict.CONTRADICTED)


def test_plain_poisson_s_epsilon_of_a_capped_scheme_is_contradicted() -> None:
    plain = epsilon_bounds(poisson(0.05, 1.0, 100), 1e-5)
    verdict = confirm(capped(0.05, 1000, 60, 1.0, 100), 1e-5, (plain.lower, plain.upper)).upper.verdict
    assert verdict is Verdict.CONTRADICTED


def test_noise_is_calibrated() -> None:
    found = calibrate_noise_multiplier(lambda noise: capped(0.05, 1000, 60, noise, 100), epsilon=4.0, delta=1e-5)
    assert 3.99 <= found.epsilon.upper <= 4.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sampling_probability", 0.0), ("sampling_probability", 1.5), ("population_size", 0), ("most_units", 0),
        ("noise_multiplier", 0.0), ("noise_multiplier", math.nan),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(field: str, value: float) -> None:
    values = {"sampling_probability": 0.5, "population_size": 5, "most_units": 2, "noise_multiplier": 1.0}
    with pytest.raises(InvalidInput, match=field):
        TruncatedPoissonSubsampledGaussian(**{**values, field: value})
