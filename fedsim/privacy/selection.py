"""Private selection: of K runs, K drawn at random and kept secret, only the one of best score is released.

**The law of K** is the truncated negative binomial of Papernot and Steinke (2022, arXiv 2110.03620, Definition 1) with
η > −1 and 0 < γ < 1: P[K = k] ∝ Γ(k + η)/Γ(η)·(1 − γ)^k/k!, k ≥ 1. Its generating function f has
f′(x) = E[K]·(γ/(1 − (1 − γ)x))^(η + 1), and f′ rises to f′(1) = E[K].

**One run** draws its setting, trains, and scores itself: all of that is its outcome y, with law Q on one data set and
Q′ on a neighbouring one. δ_Q(ε) bounds Q(E) − e^ε·Q′(E) and Q′(E) − e^ε·Q(E) for every event E.

**Theorem.** Let δ_Q(ε̂) ≤ γ(e^ε̂ − 1)/(1 − γ). For every ε ≥ 0 the release is (ε + (η + 1)ε̂, E[K]·δ_Q(ε))-private.

*Proof.* Ties do not matter: given the scores, outcomes are independent, so whichever rule picks among the best by
order and coins alone, the release has the law of an outcome given that its score is the largest. Let each outcome
carry a uniform number that is independent of all data, by which ties are broken, and which is not released; by
post-processing it changes no δ. Now no two are equal, and F(y), the probability under Q of an outcome worse than y,
has no jumps. The release A has P[K = k, A ∈ E] = P[K = k]·k·∫_E F^(k−1) dQ, and so dA = f′(F) dQ; on the neighbour
dA′ = f′(F′) dQ′. For y let a = 1 − F(y) and a′ = 1 − F′(y), the probabilities of an outcome better than y, which is an
event. So a′ ≤ e^ε̂·a + δ_Q(ε̂), and

    γ + (1 − γ)a′ ≤ e^ε̂·(1 − γ)a + γ + γ(e^ε̂ − 1) = e^ε̂·(γ + (1 − γ)a).

As η + 1 > 0, f′(F) = E[K]·γ^(η+1)·(γ + (1 − γ)a)^−(η+1) ≤ e^((η+1)ε̂)·f′(F′), whatever the score. For every E then

    A(E) − e^(ε + (η+1)ε̂)·A′(E) ≤ ∫_E f′(F)·(dQ − e^ε dQ′) ≤ sup f′·δ_Q(ε) = E[K]·δ_Q(ε),

and the same with Q and Q′ exchanged. ∎ Atoms, discrete scores and −1 < η < 0 are covered. Koskela, Redberg and Wang
(2024, arXiv 2402.06701) bound the same by privacy profiles.

**Without ε̂:** outcomes of two laws can be drawn so that they differ with probability δ_Q(0) alone; K runs so drawn
differ with probability at most E[K]·δ_Q(0), and so δ(ε) ≤ E[K]·δ_Q(0) for every ε ≥ 0.

**From below:** a score may tell nothing of the data. The release is one run then, and no better than δ_Q.
"""

import math
import secrets
from collections.abc import Callable, Mapping
from decimal import Decimal, localcontext

import numpy as np
from scipy.optimize import brentq

from fedsim.errors import InvalidInput
from fedsim.privacy.best_of import LEAST_GAMMA, MOST_ETA, BestOf
from fedsim.privacy.events import Event
from fedsim.privacy.loss_cells import Floats
from fedsim.validation import require_between

GEOMETRIC = 1.0
"""η of the geometric law. Among laws under which equally many settings are expected to do better than the one that is
released, it costs all but the least ε, and far fewer runs than those of smaller η: these mostly draw one run alone,
and now and then very many (docs/selection.md)."""
ROUNDING = 1e-12
"""Relative room for the rounding of what is computed in closed form here."""
NODES = 257
DIGITS = 60
NO_SHAPE = Decimal("1e-50")
"""η so near to 0 that the law is that of 0: the two differ by less than a hundred times as much."""


def best_of(*events: Event, expected_runs: float, eta: float = GEOMETRIC) -> BestOf:
    """The selection among so many runs in expectation, each of which releases one of these events.

    Raises:
        InvalidInput: For values out of range.
    """
    return BestOf(events=events, eta=float(eta), gamma=gamma_of(expected_runs, eta))


def runs_of(selection: BestOf) -> float:
    """E[K]."""
    return mean_runs(selection.eta, selection.gamma)


def share_of(selection: BestOf, delta: float) -> float:
    """The δ of one run at which the theorem gives this δ of the release, rounded down."""
    return delta / runs_of(selection) * (1 - ROUNDING)


def added_epsilon(selection: BestOf, curve: Callable[[Floats], Floats]) -> float:
    """(η + 1)·ε̂ of the theorem, rounded up.

    The condition holds at log(1/γ), where it asks for no more than δ ≤ 1.

    Args:
        selection: The selection.
        curve: Upper bounds on δ_Q at rising ε.
    """
    low, high = 0.0, -math.log(selection.gamma)
    for _ in range(2):
        epsilons = np.linspace(low, high, NODES)
        allowed = np.expm1(epsilons) * (selection.gamma / (1 - selection.gamma)) * (1 - ROUNDING)
        met = np.flatnonzero(curve(epsilons) <= allowed)
        first = int(met[0]) if len(met) else NODES - 1
        low, high = float(epsilons[max(first - 1, 0)]), float(epsilons[first])
    return (selection.eta + 1) * high * (1 + ROUNDING)


def delta_above(selection: BestOf, epsilons: Floats, curve: Callable[[Floats], Floats]) -> Floats:
    """Upper bounds on δ of the release at many ε, from upper bounds on δ_Q at many ε."""
    added, runs = added_epsilon(selection, curve), runs_of(selection) * (1 + ROUNDING)
    at_all = runs * curve(np.zeros(1))[0]
    beyond: Floats = np.where(epsilons >= added, runs * curve(np.maximum(epsilons - added, 0.0)), 1.0)
    least: Floats = np.minimum(np.minimum(beyond, at_all), 1.0)
    return least


def selection_in(counts: Mapping[Event, int]) -> BestOf | None:
    """The selection that is all of what somebody went through; None where there is none in it.

    Raises:
        InvalidInput: Something else was released beside it, or it twice.
    """
    found = [(event, count) for event, count in counts.items() if isinstance(event, BestOf) and count]
    if not found:
        return None
    if len(found) > 1 or found[0][1] > 1 or any(counts[event] for event in counts if event != found[0][0]):
        raise InvalidInput(
            "event",
            BestOf.kind,
            "all that is released about a user",
            "A selection's bound is for the selection alone: account for each by itself, and add up ε and δ.",
        )
    return found[0][0]


def mean_runs(eta: float, gamma: float) -> float:
    """E[K] of the truncated negative binomial."""
    log = math.log(gamma)
    if abs(eta * log) < 1e-12:
        return (1 - gamma) / (-log * gamma)
    return eta * (1 - gamma) / (-gamma * math.expm1(eta * log))


def gamma_of(expected_runs: float, eta: float) -> float:
    """γ at which E[K] is so many runs.

    Raises:
        InvalidInput: For a number that is not above 1, or that no γ reaches.
    """
    if not -1 < eta <= MOST_ETA:
        raise InvalidInput("eta", eta, f"above −1 and at most {MOST_ETA:g}")
    least = mean_runs(eta, 1 - 1e-9)
    require_between("expected_runs", expected_runs, least, mean_runs(eta, LEAST_GAMMA))
    found = brentq(
        lambda log: math.log(mean_runs(eta, math.exp(log)) / expected_runs),
        math.log(LEAST_GAMMA),
        math.log1p(-1e-9),
        xtol=1e-13,
    )
    return float(min(max(math.exp(found), LEAST_GAMMA), 1 - 1e-9))


def draw_runs(eta: float, gamma: float, bits: Callable[[int], int] = secrets.randbits) -> int:
    """K, from so many random bits that its law is off by less than 10⁻⁴⁰.

    Args:
        eta, gamma: Of the law.
        bits: Random bits as an integer; by default from the operating system.
    """
    with localcontext() as context:
        context.prec = 2 * DIGITS  # 1 − γ^η loses as many of them as η has zeros
        shape, stays = Decimal(eta), 1 - Decimal(gamma)
        left = Decimal(bits(192)) / 2**192
        # P[K = 1] = f′(0) = E[K]·γ^(η+1)
        if abs(shape) < NO_SHAPE:
            chance = stays / -Decimal(gamma).ln()
        else:
            chance = shape * stays * Decimal(gamma) ** shape / (1 - Decimal(gamma) ** shape)
        runs = 1
        while left >= chance and chance > Decimal(10) ** (5 - DIGITS):
            left -= chance
            chance *= stays * (runs + shape) / (runs + 1)
            runs += 1
        return runs
