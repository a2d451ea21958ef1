"""What is seen of rounds whose noise is correlated: C times the releases, in which it is independent again."""

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from experiments.audit.rig import OnlyRound, Rig, Seen
from fedsim.plan import Plan


def independent(plan: Plan) -> Plan:
    """The plan with noise that is independent from round to round."""
    return dataclasses.replace(plan, noise_coefficients=(1.0,), noise_buffers=())


def fresh(coefficients: Sequence[float] | np.ndarray, released: np.ndarray) -> np.ndarray:
    """C·y: each round's whitened sum with the earlier ones' put back, so that what is left is fresh noise.

    Args:
        coefficients: c.
        released: y, whitened sums from a chain's first round on, float64 [rounds, P].
    """
    mixed = np.zeros_like(released)
    for lag, coefficient in enumerate(coefficients[: len(released)]):
        mixed[lag:] += coefficient * released[: len(released) - lag]
    return mixed


def one_turn(rig: Rig, round: OnlyRound, turn: int) -> Seen:
    """What a new chain shows of one round: the sum with noise of σ, as if its noise were independent.

    A contribution to round t is in rows t, t + 1, … of C times the releases, times c_0, c_1, …; the same combination
    of those rows is the likelihood ratio's statistic.

    Args:
        rig: The rig.
        round: Its round, in the state of a run's first.
        turn: The round looked at.
    """
    plan, correlation = rig.plan, rig.plan.correlation
    assert correlation is not None
    # With buffers a contribution is in all later rows: those before the user's next turn tell of this one.
    rounds = turn + (plan.bands if correlation.buffered is None else plan.scheme.separation)
    released, norms, unit = [], [], rig.units_of_noise(round)
    for number in range(rounds):
        round.release.clip_norm = plan.clip_norm  # where it follows a count, absent users would let it run away
        each = rig.units_of_noise(round)
        seen = rig.seen(round, number)
        released.append(seen.sum / each)
        norms.append(seen.clip_norm)
    c = correlation.coefficients_of(rounds)
    there = c[: rounds - turn]
    matched = there @ fresh(c, np.array(released))[turn:] / (there @ there)
    return Seen(sum=matched * unit, clip_norm=norms[turn])


def by_turns(coefficients: Sequence[float] | np.ndarray, apart: int, rounds: int) -> np.ndarray:
    """By how much a user in every so many rounds, from the first, moves the rows of C·x, float64 [rounds]."""
    moved = np.zeros(rounds)
    moved[: len(coefficients)] = coefficients[:rounds]
    for first in range(apart):
        moved[first::apart] = np.cumsum(moved[first::apart])
    return moved


def strength(plan: Plan) -> float:
    """How many times as strong as independent noise fresh noise must be, from what a user's turns move together.

    It is ‖c‖₂ where they are in no row together.
    """
    apart = plan.scheme.separation
    turns = -(-plan.steps // apart)
    correlation, rounds = plan.correlation, turns * apart
    c = np.ones(1) if correlation is None else correlation.coefficients_of(rounds)
    return float(np.linalg.norm(by_turns(c, apart, rounds)) / np.sqrt(turns))


def over_turns(
    coefficients: Sequence[float] | np.ndarray, apart: int, rounds: int, turn: np.ndarray, rows: Iterable[np.ndarray]
) -> np.ndarray:
    """The sum over each canary's rounds of what one_turn makes of them, up to a factor: of Cᵀ·C·y, float64 [m].

    Args:
        coefficients: c.
        apart: Rounds from one of a canary's to its next.
        rounds: All there are.
        turn: Each canary's first, int [m].
        rows: Whitened sums of a chain's rounds, float64 [m] each, in order; canary u's is in value u.
    """
    c, scores, moved = np.asarray(coefficients), np.zeros(len(turn)), by_turns(coefficients, apart, rounds)
    kept: deque[np.ndarray] = deque(maxlen=len(c))
    for number, row in enumerate(rows):
        kept.appendleft(row)
        mixed = sum(coefficient * earlier for coefficient, earlier in zip(c, kept, strict=False))
        since = number - turn
        scores += np.where(since >= 0, moved[np.maximum(since, 0)], 0.0) * mixed
    return scores
