"""The learning rate over the rounds: what the server's optimizer follows, and what noise is fitted to."""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def schedule_factor(schedule: Schedule, warmup_rounds: int, done: int, rounds: int) -> float:
    """The learning rate of a round over the peak: linear warm-up, then the named decay.

    Args:
        schedule: How the learning rate falls to zero after the warm-up; constant does not fall.
        warmup_rounds: Rounds over which it rises linearly from zero.
        done: Rounds before this one: 0 in the first.
        rounds: Rounds of the whole run.
    """
    if done < warmup_rounds:
        return (done + 1) / (warmup_rounds + 1)
    progress = (done - warmup_rounds) / max(1, rounds - warmup_rounds)
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return 1.0
