"""A whole run under audit at once: many canary users with orthogonal updates, each in or out by a fair coin."""

import numpy as np

from experiments.audit_rounds import PARAMETER, Build, Clipped
from fedsim.plan import UlsPlan
from server.release import Release


def one_run_scores(
    plan: UlsPlan,
    canaries: int,
    coins: np.ndarray,
    *,
    build: Build | None = None,
    sampling_seed: int = 1,
    noise_seed: int = 2,
) -> np.ndarray:
    """Scores of the canaries after a run of all the plan's steps.

    Canary u is user u and updates coordinate u alone, beyond the clip norm; its score is the sum of what was released
    there. Larger means more likely in.

    Args:
        plan: What is claimed; at least `canaries` users.
        canaries: m.
        coins: bool [m]; whether each takes part in the run at all.
        build: The pieces under audit.
        sampling_seed: Seed of the sampling.
        noise_seed: Seed of the noise.

    Returns:
        float64 [m].
    """
    build = build or Build()
    rows = (100 * plan.clip_norm * np.eye(canaries)).astype(np.float32)
    release = Release(plan, {PARAMETER: canaries}, noise_seed)
    scores = np.zeros(canaries)
    for round in range(plan.steps):
        units = build.sample(plan, round, sampling_seed)
        taking_part = [unit for unit in units.tolist() if unit < canaries and coins[unit]]
        updates = [np.repeat(rows[unit : unit + 1], plan.group_size, axis=0) for unit in taking_part]
        clipped = build.clip(plan, release, updates) if updates else Clipped(total=np.zeros(canaries, np.float32))
        scores += build.release(plan, release, clipped, len(units), round)
    return scores
