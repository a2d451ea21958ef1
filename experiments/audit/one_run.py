"""A whole run under audit at once: many canary users with orthogonal updates, each in or out by a fair coin."""

import numpy as np

from experiments.audit.rounds import Build, Clipped, sizes_of
from fedsim.plan import ElsPlan, Plan
from server.release import Release


def one_run_scores(
    plan: Plan,
    coins: np.ndarray,
    *,
    build: Build | None = None,
    sampling_seed: int = 1,
    noise_seed: int = 2,
) -> np.ndarray:
    """Scores of the canaries after a run of all the plan's steps.

    Canary u updates coordinate u alone, beyond the clip norm; its score is the sum of what was released there. In ULS
    it is user u; in ELS it owns the examples uG to uG + G − 1. Larger means more likely in.

    Args:
        plan: What is claimed; its population must hold all canaries.
        coins: bool [m]; whether each takes part in the run at all.
        build: The pieces under audit.
        sampling_seed: Seed of the sampling.
        noise_seed: Seed of the noise.

    Returns:
        float64 [m].
    """
    build = build or Build()
    canaries = len(coins)
    units_each, rows_each = (plan.group_size, 1) if isinstance(plan, ElsPlan) else (1, plan.group_size)
    rows = (100 * plan.clip_norm * np.eye(canaries)).astype(np.float32)
    release = Release(plan, sizes_of(canaries), noise_seed)
    parameters = np.zeros(canaries, dtype=np.float32)
    scores = np.zeros(canaries)
    for round in range(plan.steps):
        units = build.sample(plan, round, sampling_seed)
        owners = units[units < canaries * units_each] // units_each
        updates = [np.repeat(rows[owner : owner + 1], rows_each, axis=0) for owner in owners[coins[owners]]]
        clipped = build.clip(plan, release, updates) if updates else Clipped(total=np.zeros(canaries, np.float32))
        released = build.release(plan, release, clipped, len(units), round)
        statistics = {"units": float(len(units)), "clipped_units": clipped.clipped}
        release.observe(released, parameters, statistics, round)
        scores += released
    return scores
