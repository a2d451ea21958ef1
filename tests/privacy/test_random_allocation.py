"""Random allocation: one block's pair, known between two, against closed forms, quadrature, sampling and a peer."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import ndtr

from experiments.account.command import Account
from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import delta_bounds, epsilon_bounds
from fedsim.privacy.allocated_pair import AllocatedPair, mean_law
from fedsim.privacy.bounds import Bounds
from fedsim.privacy.calibration import calibrate_noise_multiplier
from fedsim.privacy.certify import Question, certify
from fedsim.privacy.check import NotCheckable, Verdict, confirm
from fedsim.privacy.events import (
    Adjacency,
    Composed,
    Event,
    Gaussian,
    OfBlock,
    PoissonSubsampledGaussian,
    RandomAllocatedGaussian,
    Repeated,
    from_json,
    to_json,
)
from fedsim.privacy.merged import merged
from fedsim.privacy.ratio_sums import RatioLaw, add, finer, single, trimmed

REPLACE = Adjacency.REPLACE_ONE_USER
PEER = {
    (100, 2, 0.5, 1e-5): (6.561642, 6.613201),
    (10, 20, 0.8, 1e-6): (15.370544, 15.466689),
    (2, 1, 1.0, 1e-5): (3.655698, 3.736773),
}
"""gaussian_allocation_epsilon_range(delta=δ, sigma=σ, num_steps=t, num_epochs=k) of pld-accounting 2.0, by
(t, k, σ, δ)."""


def blocks(rounds: int, count: int, noise: float) -> Event:
    return Repeated(event=RandomAllocatedGaussian(rounds_per_block=rounds, noise_multiplier=noise), count=count)


def directed(rounds: int, count: int, noise: float, epsilon: float, *, add_user: bool) -> Bounds:
    """δ at ε of one direction."""
    pair = AllocatedPair(rounds, noise)
    return certify([(pair, count)], Question(epsilon, None, 1e-3), swapped=add_user)


def test_a_block_of_one_round_is_a_gaussian() -> None:
    one = epsilon_bounds(blocks(1, 7, 1.3), 1e-6)
    assert one == epsilon_bounds(Repeated(event=Gaussian(noise_multiplier=1.3), count=7), 1e-6)


def delta_of_two(noise: float, epsilon: float, *, add_user: bool) -> float:
    """δ of two rounds: over the first round's output by quadrature, over the second's in closed form."""
    size = math.exp(epsilon)

    def inner(z: float) -> float:
        first = math.exp(z / noise - 1 / (2 * noise**2))
        density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        edge = (2 / size if add_user else 2 * size) - first
        z2 = noise * math.log(edge) + 1 / (2 * noise) if edge > 0 else -math.inf
        if add_user:
            return density * ((1 - size * first / 2) * ndtr(z2) - size / 2 * ndtr(z2 - 1 / noise))
        return density * ((first / 2 - size) * ndtr(-z2) + ndtr(1 / noise - z2) / 2)

    kink = noise * math.log(2 / size if add_user else 2 * size) + 1 / (2 * noise)
    ends = [-38.0, min(kink, 38.0), 38.0 + 1 / noise]
    return sum(quad(inner, *pair, epsabs=0, epsrel=1e-10, limit=400)[0] for pair in pairwise(ends))


@pytest.mark.parametrize("add_user", [False, True])
@pytest.mark.parametrize(("noise", "epsilon"), [(0.4, 3.0), (0.4, 0.1), (1.0, 1.0), (1.0, 4.0), (5.0, 0.2)])
def test_two_rounds_are_as_by_quadrature(noise: float, epsilon: float, add_user: bool) -> None:
    exact = delta_of_two(noise, epsilon, add_user=add_user)
    found = directed(2, 1, noise, epsilon, add_user=add_user)
    assert found.lower * (1 - 1e-8) <= exact <= found.upper * (1 + 1e-8)
    assert found.gap <= 1e-3 or exact < 1e-60


@pytest.mark.parametrize("add_user", [False, True])
@pytest.mark.parametrize(("rounds", "count", "noise"), [(3, 1, 0.5), (20, 1, 0.4), (7, 3, 1.0), (50, 2, 1.5)])
def test_delta_is_as_sampled(rounds: int, count: int, noise: float, add_user: bool) -> None:
    draw = np.random.default_rng(rounds)
    z = draw.standard_normal((60_000, count, rounds))
    if not add_user:
        z[:, :, 0] += 1 / noise
    losses = np.log(np.exp(z / noise - 1 / (2 * noise**2)).mean(axis=2)).sum(axis=1)
    for epsilon in np.quantile(-losses if add_user else losses, [0.6, 0.95]).clip(0):
        samples = np.maximum(-np.expm1(epsilon - (-losses if add_user else losses)), 0)
        error = 5 * samples.std() / math.sqrt(len(samples))
        found = directed(rounds, count, noise, float(epsilon), add_user=add_user)
        assert found.lower - error <= samples.mean() <= found.upper + error
        assert found.gap <= 1e-3


def hockey_sticks(law: RatioLaw, epsilons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """δ at each ε of the law's own pair: remove, add."""
    q, p = law.masses
    q_all, p_all = np.append(q, law.nothing[0]), np.append(p, law.nothing[1])
    remove = np.maximum(p_all - np.exp(epsilons)[:, None] * q_all, 0).sum(axis=1)
    added = np.maximum(q_all - np.exp(epsilons)[:, None] * p_all, 0).sum(axis=1)
    return remove, added


@pytest.mark.parametrize("seed", range(8))
def test_coarse_laws_enclose_fine_ones(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rounds, noise = int(2 ** draw.uniform(1, 8)), float(10 ** draw.uniform(-0.5, 0.4))
    exponent = math.floor(math.log2(min(1 / noise, math.sqrt(math.expm1(1 / noise**2) / rounds)) / 8))
    epsilons = np.linspace(0, 3 / noise, 40)
    curves = {
        (move, finer_by): np.stack(hockey_sticks(mean_law(rounds, noise, exponent - finer_by, -20, move), epsilons))
        for move in ("spread", "merge")
        for finer_by in (0, 3)
    }
    order = [curves[key] for key in (("merge", 0), ("merge", 3), ("spread", 3), ("spread", 0))]
    for smaller, larger in pairwise(order):
        assert (smaller <= larger + 1e-12).all()
    assert (order[0] < order[3]).any(), "the enclosure is not empty"
    assert np.allclose(order[1], order[2], atol=2e-3)


@pytest.mark.parametrize("move", ["spread", "merge"])
def test_every_sum_keeps_both_measures(move: str) -> None:
    one = single(0.7, 0.05, (-40.0, 40.0), move)  # type: ignore[arg-type]
    five = add(finer(add(add(one, one), add(one, one)), 2), finer(one, 2), 2)
    cut = trimmed(five, 1e-6, 1e-4)
    assert cut.masses.shape[1] < five.masses.shape[1] / 2
    for law in (one, five, cut):
        total = law.masses.sum(axis=1) + law.nothing
        assert (total <= 1 + 1e-12).all()
        assert (total + law.above >= 1 - 1e-12).all()
    if move == "spread":
        values = np.exp(five.points)
        assert np.allclose(five.masses[1], five.masses[0] * values, rtol=1e-10, atol=1e-300)
        assert cut.above[1] > 0


@pytest.mark.parametrize(("setting", "theirs"), PEER.items())
def test_a_peers_bounds_enclose_ours(setting: tuple[int, int, float, float], theirs: tuple[float, float]) -> None:
    rounds, count, noise, delta = setting
    ours = epsilon_bounds(blocks(rounds, count, noise), delta)
    assert theirs[0] <= ours.lower <= ours.upper <= theirs[1]
    assert ours.met


def test_the_documented_setting_costs_less_than_poisson() -> None:
    found = epsilon_bounds(blocks(100, 2, 0.5), 1e-5)
    assert 6.5 <= found.lower <= found.upper <= 6.62
    poisson = PoissonSubsampledGaussian(sampling_probability=0.01, noise_multiplier=0.5)
    assert found.upper < epsilon_bounds(Repeated(event=poisson, count=200), 1e-5).lower - 1


def test_more_noise_fewer_blocks_and_longer_blocks_cost_less() -> None:
    for events in (
        [blocks(60, 3, noise) for noise in (0.5, 0.52, 0.7, 1.5)],
        [blocks(60, count, 0.8) for count in (9, 8, 2, 1)],
        [blocks(rounds, 2, 0.8) for rounds in (2, 3, 10, 64)],
    ):
        found = [epsilon_bounds(event, 1e-6) for event in events]
        for more, less in pairwise(found):
            assert less.upper < more.lower


@pytest.mark.parametrize("seed", range(14))
def test_any_setting_is_bounded(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rounds, noise = int(2 * 1000 ** draw.uniform(0, 1)), float(10 ** draw.uniform(math.log10(0.3), 1))
    count, delta = int(100 ** draw.uniform(0, 1)), float(10 ** draw.uniform(-10, -3))
    found = epsilon_bounds(blocks(rounds, count, noise), delta)
    assert 0 <= found.lower <= found.upper < math.inf
    assert found.met, (rounds, count, noise, delta, found)


@pytest.mark.parametrize("noise", [0.012, 0.05, 100.0])
def test_noise_far_from_the_usual_is_bounded_too(noise: float) -> None:
    found = epsilon_bounds(blocks(20, 1, noise), 1e-5)
    alone = epsilon_bounds(Gaussian(noise_multiplier=noise), 1e-5)
    assert found.met
    assert (alone.lower - math.log(20)) * 0.999 <= found.upper <= alone.upper


def test_blocks_compose_with_other_releases() -> None:
    both = Composed(events=(blocks(30, 2, 0.9), Gaussian(noise_multiplier=4.0)))
    found = epsilon_bounds(both, 1e-6)
    assert found.met
    assert found.lower > epsilon_bounds(blocks(30, 2, 0.9), 1e-6).upper
    at = delta_bounds(both, found.upper)
    assert at.lower <= 1e-6


def test_a_replaced_user_and_values_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidInput, match="adjacency"):
        epsilon_bounds(blocks(10, 1, 1.0), 1e-5, adjacency=REPLACE)
    with pytest.raises(NotCheckable, match="adjacency"):
        confirm(blocks(10, 1, 1.0), 1e-5, (0.0, 1.0), REPLACE)
    with pytest.raises(NotCheckable, match="noise_multiplier"):
        confirm(blocks(10, 1, 0.05), 1e-5, (0.0, 1.0))
    for rounds, noise in ((0, 1.0), (10, 0.0), (10, -1.0)):
        with pytest.raises(InvalidInput):
            RandomAllocatedGaussian(rounds_per_block=rounds, noise_multiplier=noise)


def test_the_event_is_kept_as_json() -> None:
    event = blocks(10, 3, 0.75)
    assert from_json(json.loads(json.dumps(to_json(event)))) == event


@pytest.mark.parametrize("setting", [(2, 1, 1.0, 1e-5), (50, 40, 1.0, 1e-6), (7, 1000, 2.0, 1e-6), (12, 2, 0.5, 1e-8)])
def test_the_second_method_confirms_bounds_and_contradicts_others(setting: tuple[int, int, float, float]) -> None:
    rounds, count, noise, delta = setting
    event = blocks(rounds, count, noise)
    bounds = epsilon_bounds(event, delta)
    assert confirm(event, delta, (bounds.lower, bounds.upper)).verdict is Verdict.CONFIRMED
    beyond = confirm(event, delta, (bounds.upper * 1.001, bounds.lower * 0.999))
    assert (beyond.lower.verdict, beyond.upper.verdict) == (Verdict.CONTRADICTED, Verdict.CONTRADICTED)


def test_calibrated_noise_meets_its_target_and_no_less_would() -> None:
    found = calibrate_noise_multiplier(lambda noise: blocks(20, 3, noise), epsilon=4.0, delta=1e-5)
    assert 3.98 <= found.epsilon.lower <= found.epsilon.upper <= 4.0
    assert epsilon_bounds(blocks(20, 3, found.value * 0.995), 1e-5).lower > 4.0


def account(**values: object) -> dict[str, object]:
    return Account(algorithm="uls", sampling="random-allocation", **values).result()  # type: ignore[arg-type]


def test_account_charges_whole_blocks() -> None:
    whole = account(rounds_per_block=100, noise_multiplier=0.5, steps=200)
    begun = account(rounds_per_block=100, noise_multiplier=0.5, steps=101)
    more = account(rounds_per_block=100, noise_multiplier=0.5, steps=201)
    assert whole["epsilon"] == begun["epsilon"]
    assert whole["epsilon"]["upper"] == epsilon_bounds(blocks(100, 2, 0.5), 1e-5).upper  # type: ignore[index]
    assert more["epsilon"]["upper"] == epsilon_bounds(blocks(100, 3, 0.5), 1e-5).upper  # type: ignore[index]
    assert account(rounds_per_block=100, noise_multiplier=0.0, steps=0)["epsilon"]["upper"] == 0  # type: ignore[index]


def test_account_finds_what_was_left_out() -> None:
    steps = account(rounds_per_block=50, noise_multiplier=0.9, target_epsilon=4.0)["steps"]
    assert epsilon_bounds(blocks(50, math.ceil(steps / 50), 0.9), 1e-5).upper <= 4.0  # type: ignore[operator]
    assert epsilon_bounds(blocks(50, math.ceil((steps + 1) / 50), 0.9), 1e-5).upper > 4.0  # type: ignore[operator]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"noise_multiplier": 1.0, "steps": 10}, "rounds-per-block"),
        ({"noise_multiplier": 1.0, "steps": 10, "rounds_per_block": 0}, "rounds_per_block"),
        ({"noise_multiplier": 1.0, "steps": 10, "rounds_per_block": 5, "sampling_probability": 0.1}, "probability"),
        ({"noise_multiplier": 1.0, "steps": 10, "rounds_per_block": 5, "adjacency": REPLACE.value}, "adjacency"),
    ],
)
def test_account_refuses_what_does_not_go_together(values: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        account(**values)
    with pytest.raises(InvalidInput, match="sampling"):
        Account(algorithm="els", sampling="random-allocation", noise_multiplier=1.0, steps=10, group_size=2).result()


def test_rounds_of_one_block_are_charged_once_and_each_block_anew() -> None:
    event = RandomAllocatedGaussian(rounds_per_block=3, noise_multiplier=1.0)
    charges = [OfBlock(event=event, block=round // 3) for round in range(8)]
    assert merged(charges) == Composed(events=(Repeated(event=event, count=3),))
    assert merged(charges[:3]) == Composed(events=(Repeated(event=event, count=1),))
