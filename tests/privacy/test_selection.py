"""The theorem of private selection against laws of which all is known exactly, under scores of all kinds."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import delta_bounds, delta_bounds_at, epsilon_against, epsilon_bounds, is_tight
from fedsim.privacy.best_of import BestOf
from fedsim.privacy.calibration import calibrate_noise_multiplier
from fedsim.privacy.check import NotCheckable, Verdict, confirm
from fedsim.privacy.check.selection import expected_runs
from fedsim.privacy.events import (
    Adjacency,
    Composed,
    Event,
    Gaussian,
    OneOf,
    PoissonSubsampledGaussian,
    Repeated,
    from_json,
    to_json,
)
from fedsim.privacy.gaussian_curve import gaussian_delta, gaussian_epsilon
from fedsim.privacy.ledger import Ledger, merged, read_entries
from fedsim.privacy.selection import added_epsilon, best_of, delta_above, draw_runs, gamma_of, mean_runs, runs_of

LAWS = [(1.0, 0.05), (0.0, 0.02), (-0.5, 0.01), (2.0, 0.2), (-0.9, 0.3), (0.3, 0.7)]


def chances(eta: float, gamma: float, most: int) -> np.ndarray:
    """P[K = k], k = 1 … most, from the recursion of the definition alone."""
    weights = np.cumprod([1.0, *((1 - gamma) * (k + eta) / (k + 1) for k in range(1, most))])
    return weights / weights.sum()


def slope(eta: float, gamma: float, x: np.ndarray) -> np.ndarray:
    """f′(x), in closed form."""
    return mean_runs(eta, gamma) * (gamma / (1 - (1 - gamma) * x)) ** (eta + 1)


@pytest.mark.parametrize(("eta", "gamma"), LAWS)
def test_mean_and_generating_function_are_those_of_the_definition(eta: float, gamma: float) -> None:
    p, k = chances(eta, gamma, 20_000), np.arange(1, 20_001)
    assert mean_runs(eta, gamma) == pytest.approx(float(p @ k), rel=1e-9)
    assert gamma_of(mean_runs(eta, gamma), eta) == pytest.approx(gamma, rel=1e-9)
    for x in (0.0, 0.3, 0.9, 1.0):
        assert float(slope(eta, gamma, np.array(x))) == pytest.approx(float(p @ (k * x ** (k - 1))), rel=1e-9)


def test_mean_is_continuous_at_the_logarithmic_law() -> None:
    assert mean_runs(1e-11, 0.02) == pytest.approx(mean_runs(0.0, 0.02), rel=1e-9)
    assert mean_runs(-1e-9, 0.02) == pytest.approx(mean_runs(0.0, 0.02), rel=1e-8)


@pytest.mark.parametrize(("eta", "gamma"), LAWS)
def test_runs_are_drawn_by_the_law(eta: float, gamma: float) -> None:
    draw = np.random.default_rng(3)

    def bits(count: int) -> int:
        return int.from_bytes(draw.bytes(count // 8), "big")

    drawn = np.array([draw_runs(eta, gamma, bits) for _ in range(4000)])
    assert drawn.min() == 1
    p = chances(eta, gamma, 20_000)
    edges = [1, 2, 3, 5, 9, 17, 33]
    bins = [(drawn >= low) & (drawn < high) for low, high in itertools.pairwise([*edges, 10**9])]
    expected = np.array([p[low - 1 : high - 1].sum() for low, high in itertools.pairwise([*edges, 20_001])])
    kept = expected * len(drawn) > 5
    counts = np.array([one.sum() for one in bins])[kept]
    wanted = expected[kept] / expected[kept].sum() * counts.sum()
    assert stats.chisquare(counts, wanted).pvalue > 1e-3


def test_the_ends_of_the_random_bits_end() -> None:
    for eta, gamma in LAWS:
        assert draw_runs(eta, gamma, lambda count: 0) == 1
        assert draw_runs(eta, gamma, lambda count: 2**count - 1) > 30


def test_a_shape_next_to_none_draws_as_none_does() -> None:
    draw = np.random.default_rng(5)
    for number in (int.from_bytes(draw.bytes(24), "big") for _ in range(200)):
        runs = {draw_runs(eta, 0.02, lambda _, bits=number: bits) for eta in (0.0, 1e-300, -1e-100, 1e-45, 1e-35)}  # type: ignore[misc]
        assert len(runs) == 1


class Pair:
    """Two laws on finitely many outcomes: q and other [n]."""

    def __init__(self, q: np.ndarray, other: np.ndarray) -> None:
        self.q, self.other = q / q.sum(), other / other.sum()

    def delta(self, epsilons: np.ndarray) -> np.ndarray:
        """δ_Q, the larger direction at each ε ≥ 0."""
        factor = np.exp(epsilons)[:, None]
        one, two = np.maximum(self.q - factor * self.other, 0), np.maximum(self.other - factor * self.q, 0)
        return np.maximum(one.sum(1), two.sum(1))

    def selected(self, scores: np.ndarray, eta: float, gamma: float) -> "Pair":
        """The laws of the release: f(≤ s) − f(< s) of each score, shared out among its outcomes."""
        values, places = np.unique(-scores, return_inverse=True)  # from the best on
        laws = []
        for law in (self.q, self.other):
            masses = np.bincount(places, law, len(values))
            better = np.append(0.0, np.cumsum(masses)[:-1])
            released = gained(eta, gamma, better, masses)
            laws.append(law * np.divide(released, masses, out=np.zeros_like(masses), where=masses > 0)[places])
        return Pair(*laws)


def gained(eta: float, gamma: float, better: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """f(1 − better) − f(1 − better − mass), without cancellation."""
    least = gamma + (1 - gamma) * better
    growth = np.log1p((1 - gamma) * mass / least)
    if eta == 0:
        return growth / -math.log(gamma)
    return least**-eta * -np.expm1(-eta * growth) / (gamma**-eta - 1)


def gaussian_pair(mu: float, cells: int = 1500) -> Pair:
    """N(0, 1) against N(μ, 1), in cells: what is told of a Gaussian that was rounded."""
    edges = np.linspace(-7, mu + 7, cells + 1)

    def masses(mean: float) -> np.ndarray:
        low, high = edges[:-1] - mean, edges[1:] - mean
        return np.where(low < 0, stats.norm.cdf(high) - stats.norm.cdf(low), stats.norm.sf(low) - stats.norm.sf(high))

    return Pair(masses(0.0), masses(mu))


def hard_scores(pair: Pair, threshold: float) -> np.ndarray:
    """Best are outcomes far likelier under the neighbour, then those far likelier here, and last all others.

    By the first group F and F′ differ as much as they can; the second has the outcomes that tell most.
    """
    ratio = np.log(np.maximum(pair.q, 1e-300)) - np.log(np.maximum(pair.other, 1e-300))
    first = ratio < -threshold
    scores = ratio.copy()
    scores[first] = ratio.max() + 1
    return scores


def scores_of(pair: Pair, added: float, draw: np.random.Generator) -> Iterator[np.ndarray]:
    count = len(pair.q)
    yield np.arange(count)
    yield -np.arange(count)
    yield np.zeros(count)
    yield draw.permutation(count)
    yield draw.integers(0, 4, count)
    for threshold in (added, added / 2, 0.0):
        yield hard_scores(pair, threshold)
        yield hard_scores(Pair(pair.other, pair.q), threshold)


EPSILONS = np.linspace(0, 20, 81)


def pairs(draw: np.random.Generator) -> Iterator[Pair]:
    yield from map(gaussian_pair, (0.2, 0.7, 2.0, 4.0))
    for spread in (0.3, 1.5, 4.0):
        q = draw.dirichlet(np.ones(12))
        yield Pair(q, q * np.exp(spread * draw.normal(size=12)))
    q = draw.dirichlet(np.ones(8))
    yield Pair(q, np.where(np.arange(8) == 3, 0.0, q))  # an outcome that the neighbour never has


@pytest.mark.parametrize(("eta", "gamma"), LAWS)
def test_no_score_makes_the_release_tell_more_than_the_theorem_says(eta: float, gamma: float) -> None:
    draw = np.random.default_rng(7)
    event = BestOf(events=(Gaussian(noise_multiplier=1.0),), eta=eta, gamma=gamma)
    for pair in pairs(draw):
        bound = delta_above(event, EPSILONS, pair.delta)
        added = added_epsilon(event, pair.delta) / (eta + 1)
        for scores in scores_of(pair, added, draw):
            found = pair.selected(scores, eta, gamma).delta(EPSILONS)
            assert (found <= bound * (1 + 1e-9) + 1e-13).all()


@pytest.mark.parametrize(
    ("eta", "gamma", "mu"), [(1.0, 0.1, 1.9), (0.0, 0.02, 1.9), (-0.5, 0.01, 0.8), (1.0, 0.05, 0.3)]
)
def test_some_score_comes_close_to_the_theorem(eta: float, gamma: float, mu: float) -> None:
    """ε at δ = 10⁻⁵: what the worst order of a Gaussian's outcomes needs, and what is claimed."""
    pair = gaussian_pair(mu)
    event = BestOf(events=(Gaussian(noise_multiplier=1.0),), eta=eta, gamma=gamma)
    fine = np.linspace(0, 20, 2001)
    claimed = fine[np.flatnonzero(delta_above(event, fine, pair.delta) <= 1e-5)[0]]
    added = added_epsilon(event, pair.delta) / (eta + 1)
    needed = max(
        fine[np.flatnonzero(pair.selected(hard_scores(one, added), eta, gamma).delta(fine) <= 1e-5)[0]]
        for one in (pair, Pair(pair.other, pair.q))
    )
    alone = fine[np.flatnonzero(pair.delta(fine) <= 1e-5)[0]]
    assert alone < needed <= claimed
    assert claimed - needed < 0.08 * claimed, (claimed, needed, alone)


def test_the_release_is_simulated_as_it_is_computed() -> None:
    """The first of the best of K drawn runs, ties by order, against the law with ties shared out."""
    draw, eta, gamma = np.random.default_rng(1), 1.0, 0.2
    law, scores = np.array([0.4, 0.1, 0.2, 0.3]), np.array([1, 2, 2, 0])
    released = []
    for runs in draw.geometric(gamma, 40_000):  # η = 1
        outcomes = draw.choice(4, size=runs, p=law)
        released.append(outcomes[np.argmax(scores[outcomes])])
    wanted = Pair(law, law).selected(scores, eta, gamma).q
    assert stats.chisquare(np.bincount(released, minlength=4), wanted * len(released)).pvalue > 1e-3


@pytest.mark.parametrize("runs", [3.0, 12.0, 72.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_less_than_renyi_accounting_of_the_same(runs: float, eta: float, noise: float) -> None:
    from dp_accounting import GaussianDpEvent
    from dp_accounting.dp_event import RepeatAndSelectDpEvent
    from dp_accounting.rdp import RdpAccountant

    event = best_of(Gaussian(noise_multiplier=noise), expected_runs=runs, eta=eta)
    added = added_epsilon(event, lambda at: np.array([gaussian_delta(1 / noise, float(e)).upper for e in at]))
    ours = gaussian_epsilon(1 / noise, 1e-5 / runs_of(event)).upper + added
    peer = RdpAccountant().compose(RepeatAndSelectDpEvent(GaussianDpEvent(noise), runs, eta)).get_epsilon(1e-5)
    assert ours < peer
    assert ours > gaussian_epsilon(1 / noise, 1e-5).upper


def test_a_selection_is_data_and_refuses_what_no_law_has() -> None:
    event = best_of(Gaussian(noise_multiplier=1.0), Gaussian(noise_multiplier=2.0), expected_runs=6.0)
    assert from_json(to_json(event)) == event
    assert runs_of(event) == pytest.approx(6.0)
    assert event.gamma == pytest.approx(1 / 6)
    for wrong in ({"events": ()}, {"eta": -1.0}, {"gamma": 0.0}, {"gamma": 1.0}, {"eta": math.nan}):
        with pytest.raises(InvalidInput):
            BestOf(**({"events": event.events, "eta": 1.0, "gamma": 0.5} | wrong))
    with pytest.raises(InvalidInput, match="expected_runs"):
        best_of(Gaussian(noise_multiplier=1.0), expected_runs=1.0)


TRAINED = Repeated(event=PoissonSubsampledGaussian(sampling_probability=0.05, noise_multiplier=0.9), count=40)
SCORED = Repeated(event=Gaussian(noise_multiplier=1.5), count=1)


def test_the_accountant_adds_up_what_the_theorem_says_and_the_worst_event_counts_at_each_place() -> None:
    """Two Gaussians and a training: by hand from the curves of each."""
    delta, runs = 1e-5, 6.0
    event = best_of(TRAINED, SCORED, expected_runs=runs)
    found = epsilon_bounds(event, delta)
    parts = [epsilon_bounds(one, delta / runs) for one in (TRAINED, SCORED)]
    grid = np.linspace(0, math.log(runs), 400)
    lower = np.max([delta_bounds_at(one, grid)[0] for one in (TRAINED, SCORED)], axis=0)
    least = grid[np.flatnonzero(lower <= np.expm1(grid) / (runs - 1))[0] - 1]  # γ = 1/6
    claimed = max(one.lower for one in parts) + 2 * least
    assert claimed <= found.upper <= claimed * 1.01
    assert found.lower == max(epsilon_bounds(one, delta).lower for one in (TRAINED, SCORED))
    assert not is_tight(event)
    assert delta_bounds(event, found.upper).upper <= delta * (1 + 1e-6)
    assert epsilon_against(event, delta, 1.0, adjacency=Adjacency.ADD_OR_REMOVE_ONE_USER, tolerance=0.1).upper > 1


def test_users_who_score_and_users_who_train_pay_the_larger_and_not_the_sum() -> None:
    apart = best_of(OneOf(events=(SCORED, SCORED)), expected_runs=3.0)
    assert epsilon_bounds(apart, 1e-5) == epsilon_bounds(best_of(SCORED, expected_runs=3.0), 1e-5)
    with pytest.raises(InvalidInput, match="adjacency"):
        epsilon_bounds(apart, 1e-5, adjacency=Adjacency.REPLACE_ONE_USER)


def test_delta_is_bounded_at_all_epsilons_and_falls() -> None:
    event = best_of(SCORED, expected_runs=4.0, eta=0.0)
    at = np.array([6.0, 0.0, 1.0, 3.0])
    lower, upper = delta_bounds_at(event, at)
    for place, epsilon in enumerate(at):
        one = delta_bounds(event, float(epsilon))
        assert (lower[place], upper[place]) == pytest.approx((one.lower, one.upper), rel=1e-2)
        assert lower[place] <= upper[place] <= 1
    assert upper[1] >= upper[2] >= upper[3] >= upper[0]


@pytest.mark.parametrize("other", [[TRAINED], [best_of(SCORED, expected_runs=3.0)]])
def test_a_selection_beside_anything_else_is_refused(other: list[Event]) -> None:
    selection = best_of(TRAINED, expected_runs=3.0)
    for event in (Composed(events=(selection, *other)), Repeated(event=selection, count=2)):
        with pytest.raises(InvalidInput, match="all that is released"):
            epsilon_bounds(merged((event,)), 1e-5)
        with pytest.raises(InvalidInput, match="all that is released"):
            delta_bounds_at(event, np.array([1.0]))
        with pytest.raises(NotCheckable):
            confirm(merged((event,)), 1e-5, (0.0, 3.0))
    with pytest.raises(InvalidInput, match="one run"):
        best_of(selection, expected_runs=3.0)


@pytest.mark.parametrize(("eta", "gamma"), LAWS)
def test_a_second_method_confirms_both_bounds_and_contradicts_less(eta: float, gamma: float, tmp_path: Path) -> None:
    assert expected_runs(eta, gamma) == pytest.approx(mean_runs(eta, gamma), rel=1e-9)
    event = BestOf(events=(SCORED, TRAINED), eta=eta, gamma=gamma)
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        ledger.charge(event, round=0, purpose="selection")
    (entry,) = read_entries(tmp_path / "ledger.jsonl")
    assert entry.event == event
    found = epsilon_bounds(merged((entry.event,)), 1e-5)
    assert confirm(merged((entry.event,)), 1e-5, (found.lower, found.upper)).verdict is Verdict.CONFIRMED
    forged = confirm(event, 1e-5, (found.lower, 0.98 * found.upper))
    assert forged.upper.verdict is Verdict.CONTRADICTED
    assert confirm(event, 1e-5, (1.01 * found.lower, found.upper)).lower.verdict is Verdict.CONTRADICTED


def test_noise_is_calibrated_to_the_total() -> None:
    found = calibrate_noise_multiplier(
        lambda noise: best_of(Gaussian(noise_multiplier=noise), expected_runs=6.0), epsilon=8.0, delta=1e-5
    )
    assert found.epsilon.upper <= 8.0
    assert found.epsilon.upper > 7.99
    assert gaussian_epsilon(1 / found.value, 1e-5).upper < 8.0
