"""The audit's statistics keep their confidence, and have teeth."""

import numpy as np
import pytest
from scipy import stats

from fedsim.errors import InvalidInput
from fedsim.privacy.audit.claim import Claim, epsilon_free, most_true_positives
from fedsim.privacy.audit.membership import attack_area
from fedsim.privacy.audit.one_run import (
    Guesses,
    guess,
    guess_by_odds,
    one_run_epsilon,
    one_run_p_value,
    one_run_permits,
)
from fedsim.privacy.audit.rates import attack_rates, clopper_pearson
from fedsim.privacy.audit.result import AuditFinding
from fedsim.privacy.events import (
    BinomialMixtureGaussian,
    Gaussian,
    PoissonSubsampledGaussian,
    Repeated,
)
from fedsim.privacy.mechanisms.laplace.event import RandomisedScaleLaplace
from fedsim.privacy.tradeoff import privacy_curve


def test_clopper_pearson_covers_at_its_confidence() -> None:
    generator = np.random.default_rng(0)
    for probability in (0.02, 0.5, 0.9):
        hits = generator.binomial(60, probability, size=2000)
        bounds = {int(k): clopper_pearson(int(k), 60, 0.95) for k in np.unique(hits)}
        lower = np.mean([bounds[int(k)][0] <= probability for k in hits])
        upper = np.mean([bounds[int(k)][1] >= probability for k in hits])
        assert min(lower, upper) >= 0.94
    assert clopper_pearson(0, 10, 0.95)[0] == 0.0
    assert clopper_pearson(10, 10, 0.95)[1] == 1.0


@pytest.mark.parametrize("q", [1.0, 0.3])
def test_most_true_positives_is_the_best_tests_rate(q: float) -> None:
    event = PoissonSubsampledGaussian(sampling_probability=q, noise_multiplier=1.2)
    for threshold in (-1.0, 0.5, 2.0, 4.0):
        false = float(stats.norm.sf(threshold / 1.2))
        true = (1 - q) * false + q * float(stats.norm.sf((threshold - 1) / 1.2))
        permitted = most_true_positives(event, false)
        assert true - 1e-6 <= permitted <= true + 5e-3


def test_most_true_positives_of_laplace_and_of_groups() -> None:
    laplace = RandomisedScaleLaplace(law=(("point", 1.0, 1.0, 0.0),))
    assert most_true_positives(laplace, 0.1) == pytest.approx(0.1 * np.e, abs=5e-3)
    group = BinomialMixtureGaussian(group_size=3, sampling_probability=1.0, noise_multiplier=3.0)
    one = Gaussian(noise_multiplier=1.0)
    assert most_true_positives(group, 0.2) == pytest.approx(most_true_positives(one, 0.2), abs=1e-2)


def test_most_true_positives_of_several_releases_is_no_less_than_the_best_test() -> None:
    event = Repeated(event=Gaussian(noise_multiplier=2.0), count=4)
    best = float(stats.norm.sf(stats.norm.isf(0.1) - 1.0))
    permitted = most_true_positives(event, 0.1)
    assert best <= permitted <= best + 0.05


def test_gaussian_many_run_bounds_hold_and_reach_sixty_percent_at_epsilon_four() -> None:
    sigma = 1.0813  # ε = 4 at δ = 1e-5, one release
    claim = Claim(make_event=lambda noise: Gaussian(noise_multiplier=noise), noise_multiplier=sigma, delta=1e-5)
    assert claim.epsilon == pytest.approx(4.0, rel=1e-3)
    generator = np.random.default_rng(5)
    contradicted = 0
    bounds = []
    for _ in range(40):
        outside = sigma * generator.standard_normal(1500)
        inside = sigma * generator.standard_normal(1500) + 1
        rates = attack_rates(inside, outside, confidence=0.95)
        contradicted += claim.contradicted_by(rates)
        bounds.append(claim.epsilon_from(rates))
        assert epsilon_free(rates, 1e-5) <= claim.epsilon
    # At 95 % confidence more than 6 of 40 would be a one-in-a-thousand accident.
    assert contradicted <= 6
    assert np.median(bounds) >= 0.6 * claim.epsilon


@pytest.mark.parametrize(("q", "canaries"), [(1.0, 300), (0.2, 2000)])
def test_one_run_bounds_hold_and_have_teeth(q: float, canaries: int) -> None:
    sigma = 0.6

    def event(noise: float) -> PoissonSubsampledGaussian:
        return PoissonSubsampledGaussian(sampling_probability=q, noise_multiplier=noise)

    claim = Claim(make_event=event, noise_multiplier=sigma, delta=1e-5)
    curve, twice_the_noise = privacy_curve(event(sigma)), privacy_curve(event(2.5 * sigma))
    generator = np.random.default_rng(9)
    wrong, seen, free = 0, 0, []
    for _ in range(60):
        coins = generator.random(canaries) < 0.5
        values = sigma * generator.standard_normal(canaries) + coins * (generator.random(canaries) < q)
        guesses = guess_by_odds(np.log1p(q * np.expm1((values - 0.5) / sigma**2)), coins, 60)
        wrong += not one_run_permits(guesses, curve)
        seen += not one_run_permits(guesses, twice_the_noise)
        free.append(one_run_epsilon(guesses, claim.delta))
    assert wrong <= 9  # 10 would be a one-in-a-thousand accident at 95 % confidence
    assert seen >= 30
    assert max(free) <= claim.epsilon


@pytest.mark.parametrize("mu", [0.7, 2.0])
def test_one_run_of_a_gaussian_is_its_closed_form(mu: float) -> None:
    curve = privacy_curve(Gaussian(noise_multiplier=1 / mu))

    def possible(guesses: Guesses, level: float) -> bool:
        r, v, total = guesses.made, guesses.correct, guesses.made / guesses.canaries
        right, wrong = level * total * v / r, level * total * (r - v) / r
        for i in range(v - 1, -1, -1):
            grown = max(wrong, float(stats.norm.cdf(stats.norm.ppf(min(right, 1.0)) - mu)))
            right, wrong = right + i / (r - i) * (grown - wrong), grown
            if right + wrong > total:
                return False
        return True

    for made in (20, 60):
        permitted = [one_run_permits(Guesses(canaries=90, made=made, correct=v), curve) for v in range(made + 1)]
        closed = [possible(Guesses(canaries=90, made=made, correct=v), 0.05) for v in range(made + 1)]
        assert permitted[0]
        assert permitted[-1] is (mu == 2.0)  # at μ = 2 so few canaries can all be told
        # The certified curve lies a little below the closed form, which is on the safe side.
        assert sum(closed) <= sum(permitted) <= sum(closed) + 1
        assert permitted == sorted(permitted, reverse=True)


def test_guesses_by_odds_are_of_the_surest() -> None:
    odds, coins = np.array([0.1, -3.0, 2.0, -0.2, 1.0]), np.array([True, False, False, True, True])
    assert guess_by_odds(odds, coins, 3) == Guesses(canaries=5, made=3, correct=2)


def test_one_run_p_value_is_the_binomial_tail_without_delta_and_grows_with_it() -> None:
    guesses = Guesses(canaries=100, made=40, correct=33)
    right = 1 / (1 + np.exp(-1.0))
    assert one_run_p_value(guesses, 1.0, 0.0) == pytest.approx(float(stats.binom.sf(32, 40, right)))
    values = [one_run_p_value(guesses, 1.0, delta) for delta in (0.0, 1e-5, 1e-3, 0.1)]
    assert values == sorted(values)
    assert one_run_epsilon(guesses, 1e-5) > 0.3
    assert one_run_epsilon(Guesses(canaries=100, made=40, correct=20), 1e-5) == 0.0
    claim = Claim(make_event=lambda noise: Gaussian(noise_multiplier=noise), noise_multiplier=1.0, delta=1e-5)
    sure = Guesses(canaries=100, made=100, correct=99)
    assert 3 < claim.epsilon_from_guesses(sure, confidence=0.95) < 20
    assert claim.epsilon_from_guesses(Guesses(canaries=100, made=40, correct=20), confidence=0.95) == 0.0


def test_guesses_abstain_in_the_middle() -> None:
    coins = np.array([False, False, True, False, True, True])
    assert guess(np.arange(6.0), coins, 4) == Guesses(canaries=6, made=4, correct=4)
    with pytest.raises(InvalidInput, match="guesses"):
        Guesses(canaries=3, made=4, correct=1)


def test_attack_area_covers_and_is_half_for_guessing() -> None:
    generator = np.random.default_rng(2)
    true_area = float(stats.norm.cdf(0.5 / np.sqrt(2)))
    covered = 0
    for _ in range(300):
        found = attack_area(generator.standard_normal(60) + 0.5, generator.standard_normal(50))
        covered += found.lower <= true_area <= found.upper
    assert covered >= 0.9 * 300
    assert attack_area(np.ones(5), np.ones(4)).area == 0.5


def test_findings_say_that_they_are_no_proof() -> None:
    finding = AuditFinding(
        attack="canary",
        epsilon_lower=2.0,
        epsilon_lower_free=1.0,
        epsilon_certified=4.0,
        delta=1e-5,
        confidence=0.95,
        contradicts=False,
        trials=100,
    )
    assert "no proof" in finding.in_words()
    assert finding.to_json()["kind"] == "evidence"


def test_scores_that_say_nothing_are_refused() -> None:
    with pytest.raises(InvalidInput, match="scores"):
        attack_rates(np.array([1.0, np.nan] * 8), np.ones(16))
    with pytest.raises(InvalidInput, match="scores"):
        attack_rates(np.ones(4), np.ones(16))
