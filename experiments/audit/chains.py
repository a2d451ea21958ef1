"""What is seen of rounds whose noise is correlated: C times the releases, in which it is independent again."""

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from experiments.audit.rig import OnlyRound, Rig, Seen


def fresh(coefficients: Sequence[float], released: np.ndarray) -> np.ndarray:
    """C·y: each round's whitened sum with the earlier ones' put back, so that what is left is ‖c‖₂·σ·ξ.

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
    plan = rig.plan
    released, norms, unit = [], [], rig.units_of_noise(round)
    for number in range(turn + plan.bands):
        round.release.clip_norm = plan.clip_norm  # where it follows a count, absent users would let it run away
        each = rig.units_of_noise(round)
        seen = rig.seen(round, number)
        released.append(seen.sum / each)
        norms.append(seen.clip_norm)
    c = np.array(plan.noise_coefficients)
    matched = c @ fresh(c.tolist(), np.array(released))[turn:] / (c @ c)
    return Seen(sum=matched * unit, clip_norm=norms[turn])


def over_turns(coefficients: Sequence[float], apart: int, turn: np.ndarray, rows: Iterable[np.ndarray]) -> np.ndarray:
    """The sum over each canary's rounds of what one_turn makes of them, up to a factor: of Cᵀ·C·y, float64 [m].

    Args:
        coefficients: c, no more than rounds are apart.
        apart: Rounds from one of a canary's to its next.
        turn: Each canary's first, int [m].
        rows: Whitened sums of a chain's rounds, float64 [m] each, in order; canary u's is in value u.
    """
    c, scores = np.array(coefficients), np.zeros(len(turn))
    kept: deque[np.ndarray] = deque(maxlen=len(c))
    for number, row in enumerate(rows):
        kept.appendleft(row)
        mixed = sum(coefficient * earlier for coefficient, earlier in zip(c, kept, strict=False))
        since = (number - turn) % apart
        scores += np.where((since < len(c)) & (since <= number), c[np.minimum(since, len(c) - 1)], 0.0) * mixed
    return scores
