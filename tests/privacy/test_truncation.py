"""How often a cap cuts and whom: against forty digits, simulated rounds and scipy."""

import math

import mpmath
import numpy as np
import pytest
from scipy import stats

from fedsim.privacy.truncation import Binomial, truncation

SETTINGS = [
    (1, 0.5, 1), (2, 1.0, 1), (12, 0.4, 5), (1000, 0.05, 60), (1000, 0.05, 20), (1000, 1e-3, 120), (200, 1.0, 30),
    (50, 0.999, 30), (340_000, 1000 / 340_000, 1224), (10**7, 1e-9, 3), (10**7, 1e-4, 2300), (10**7, 0.5, 4_999_000),
    (10**7, 0.5, 5_058_000),
]  # fmt: skip


def tail(trials: int, q: float, least: int) -> tuple[mpmath.mpf, mpmath.mpf]:
    """Pr[s ≥ least] and E[least/(s + 1); s ≥ least] of Bin(trials, q), with forty digits."""
    if least > trials:
        return mpmath.mpf(0), mpmath.mpf(0)
    chance = mpmath.mpf(q)
    if chance == 1:
        return mpmath.mpf(1), mpmath.mpf(least) / (trials + 1)

    def mass(s: int) -> mpmath.mpf:
        ways = mpmath.loggamma(trials + 1) - mpmath.loggamma(s + 1) - mpmath.loggamma(trials - s + 1)
        return mpmath.exp(ways + s * mpmath.log(chance) + (trials - s) * mpmath.log(1 - chance))

    def upwards(s: int, ratio_of_shares: bool) -> mpmath.mpf:
        term, total, odds = mass(s), mpmath.mpf(0), chance / (1 - chance)
        while term > total * mpmath.mpf(10) ** -30 and s <= trials:
            total += term * (mpmath.mpf(least) / (s + 1) if ratio_of_shares else 1)
            term, s = term * (trials - s) / (s + 1) * odds, s + 1
        return total

    begin = max(least, int(trials * q - 12 * math.sqrt(trials * q)))  # less than 1e-30 lies below
    return upwards(begin, False), upwards(begin, True)


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize(("users", "q", "cap"), SETTINGS)
def test_each_number_is_rounded_to_the_safe_side_and_little(users: int, q: float, cap: int, grows: bool) -> None:
    with mpmath.workdps(40):
        tau, weighted = tail(users - 1, q, cap)
        larger = tail(users, q, cap)[0] if grows else tau
        found = truncation(users, q, cap, grows=grows)
        assert found.untouched <= 1 - larger + mpmath.mpf(10) ** -30
        assert found.displacing <= tau * (1 + mpmath.mpf(2) ** -53)
        assert found.untouched == pytest.approx(float(1 - larger), abs=1e-6 * float(larger) + 1e-15)
        assert found.displacing == pytest.approx(float(tau), rel=1e-6)
        assert found.untouched + found.displacing + found.doubtful == pytest.approx(1, abs=1e-15)
        assert found.doubtful <= 1.1 * (larger - tau) + 2e-6 * min(larger, 1 - tau) + 2e-16 * larger + 1e-303
        if tau:
            chance = q * weighted / tau
            assert chance <= found.chance <= chance * (1 + mpmath.mpf(10) ** -6)
            kept = mpmath.mpf(cap) / (users * tau) * tail(users, q, cap + 1)[0]
            assert abs(chance - kept) <= 1e-20 * chance, "two ways to write q′"


def test_probabilities_down_to_1e_300_keep_their_digits() -> None:
    with mpmath.workdps(40):
        for trials, q, least in [(10**7, 1e-4, 2300), (10**6, 0.5, 518_440), (1000, 0.01, 215)]:
            exact = tail(trials, q, least)[0]
            low, high = Binomial(trials, q).at_least(least)
            assert 1e-302 < exact < 1e-150
            assert low <= exact <= high
            assert high - low < (1e-6 if exact > 1e-290 else 1) * exact
        low, high = Binomial(10**7, 1e-4).at_least(10**6)
        assert low == 0 < high < 1e-300


def test_shares_of_rounds_are_those_of_simulated_ones() -> None:
    """u among others who come by themselves; how often the others reach the cap, and u's chance then."""
    users, q, cap, rounds = 12, 0.4, 5, 400_000
    draw = np.random.default_rng(0)
    others, joins = draw.binomial(users - 1, q, rounds), draw.random(rounds) < q
    stays = joins & (draw.random(rounds) * np.maximum(others + 1, cap) < cap)
    full = others >= cap
    found = truncation(users, q, cap, grows=False)
    assert full.mean() == pytest.approx(found.displacing, abs=4 * 0.5 / math.sqrt(rounds))
    assert stays[full].mean() == pytest.approx(found.chance, abs=4 * 0.5 / math.sqrt(full.sum()))
    assert stays[~full].mean() == pytest.approx(q, abs=4 * 0.5 / math.sqrt((~full).sum()))


@pytest.mark.parametrize(("trials", "q"), [(1, 0.5), (40, 0.25), (1000, 1.0), (340_000, 0.003), (10**7, 0.3)])
def test_least_caps_and_means_are_those_of_the_binomial(trials: int, q: float) -> None:
    law = Binomial(trials, q)
    for chance in (1e-2, 1e-9, 1e-15):
        cap = law.least_cap(chance)
        assert stats.binom.sf(cap, trials, q) <= chance
        assert cap == 0 or stats.binom.sf(cap - 1, trials, q) > chance * (1 - 1e-6)
    for cap in (1, max(1, int(trials * q)), law.least_cap(1e-15), trials):
        below = trials * q * stats.binom.cdf(cap - 2, trials - 1, q)
        assert law.mean_up_to(cap) == pytest.approx(below + cap * stats.binom.sf(cap - 1, trials, q), rel=1e-9)
    assert law.mean_up_to(trials) == trials * q
