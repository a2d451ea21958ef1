"""What each user puts in to a round's sum: no more than the clip and the group size allow, and only if sampled.

The auditor holds the seeds: a round with users and the same round without them carry the same noise, and what is left
between them is, up to rounding, what each user put in.
"""

import dataclasses

import numpy as np

from experiments.audit.canaries import CanaryUsers
from experiments.audit.chains import independent
from experiments.audit.rig import FAR, USERS, WARM_UP, FaultyGrid, Rig, state_of, unsaid_failures
from experiments.audit.turns import in_every_turn, turns
from fedsim.clip import Clip
from fedsim.plan import Plan
from fedsim.release import CLIP_NORM
from server.round import PARAMETERS, RELEASE

SPARE_ROWS, ROUNDS = 2, 6
"""Rows that users own beyond what the plan lets them use, and rounds."""
MOST_ROWS = 4
"""Group size at which contributions are looked at, at most: a larger one says nothing else."""


def contributions(plan: Plan, seed: int) -> list[str]:
    """Users whose rows all point in directions of their own, beyond the clip and more than the group size.

    A row has two values, some in two blocks, so that norms differ.

    In every second round a worker fails, and the dispatcher gets its reply late, beside that of who took over.
    """
    group = min(plan.group_size, MOST_ROWS)
    owned = group + SPARE_ROWS
    users = CanaryUsers(np.full(USERS, owned), np.arange(USERS * owned))
    # What users put in does not depend on noise, and rounds may be looked at one by one where it is independent.
    alone = dataclasses.replace(independent(plan), sampling_probability=in_every_turn(plan) / 2)
    examined = dataclasses.replace(alone, group_size=group).on(users)
    numbers = _numbers(examined, users, seed)
    examined = dataclasses.replace(
        examined, steps=numbers[-1] + 2
    )  # so that each round announces the next one's units
    # Users of very different lengths: one that is taken for part of another shows.
    lengths = FAR * plan.clip_norm * np.repeat(8.0 ** (np.arange(USERS) % 4), owned)
    updates = np.hstack([np.diag(lengths)] * 2).astype(np.float32)
    broken: list[str] = []
    for exact in (False, True):
        rig = Rig(examined, users, updates, sampling_seed=seed, noise_seed=seed + 1, exact=exact, grid=FaultyGrid)
        with unsaid_failures():
            broken += _contributions(rig, owned, numbers, seed)
    return broken


def _numbers(plan: Plan, users: CanaryUsers, seed: int) -> list[int]:
    """Rounds to look at: neighbours, or, where users take turns, rounds of every user's."""
    apart = plan.scheme.separation
    each = [WARM_UP] if apart == 1 else (-(-WARM_UP // apart) * apart + np.unique(turns(plan, users, seed))).tolist()
    return [number + cycle * apart for cycle in range(-(-ROUNDS // len(each))) for number in each]


def _contributions(rig: Rig, owned: int, numbers: list[int], seed: int) -> list[str]:
    plan = rig.plan
    kept = np.repeat(np.random.default_rng(seed).permutation(USERS) < USERS // 2, owned)
    everybody, nobody = rig.round(), rig.round(np.empty(0, dtype=np.int64))
    some = rig.round(np.flatnonzero(kept[::owned] if plan.redraws else kept))
    for number in range(WARM_UP):  # scales that follow releases have moved then
        rig.seen(everybody, number)
    start = state_of(everybody)
    # The clip norm moves down, as the quantile may have it: who clips to an earlier one shows. Parameters of zero
    # leave float32 nothing to round but the sum.
    start |= {RELEASE + CLIP_NORM: start[RELEASE + CLIP_NORM] / 4, PARAMETERS: 0 * start[PARAMETERS]}
    everybody.load_state(start)
    clip = dataclasses.replace(everybody.release.clip, order=plan.mechanism.norm_order)
    # Sums carry noise in float32: their difference is right to a few of its rounding steps.
    tolerance = 1e-3 + 1e-5 * plan.sum_noise_multiplier
    least = tolerance * clip.norm / max(len(clip.limits), owned)
    broken, used = [], np.zeros(rig.users.num_rows, dtype=bool)
    for number in numbers:
        for round in (everybody, some, nobody):
            round.load_state(start)
        sampled = everybody.units(number)  # asked before the round: a round that runs again samples anew
        noise = rig.seen(nobody, number).sum
        put_in, of_some = rig.seen(everybody, number).sum - noise, rig.seen(some, number).sum - noise
        rows = (np.abs(put_in) > least).reshape(2, -1).any(axis=0)
        took_part = rows.reshape(-1, owned).any(axis=1) if plan.redraws else rows
        if np.isin(np.flatnonzero(took_part), sampled, invert=True).any():
            broken.append("somebody who was not sampled put something in")
        if (np.abs(of_some - np.where(np.tile(kept, 2), put_in, 0.0)) > least).any():
            broken.append("what a user put in depended on who else was there")
        broken += _beyond(put_in, owned if plan.redraws else 1, clip, rig, tolerance)
        per_user = rows.reshape(-1, owned).sum(axis=1)
        if (per_user > plan.group_size).any():
            broken.append(f"a user of group size {plan.group_size} put in {per_user.max()} examples in one step")
        used |= rows
    over_the_run = used.reshape(-1, owned).sum(axis=1)
    if not plan.redraws and (over_the_run > plan.group_size).any():
        broken.append(f"a user of group size {plan.group_size} put in {over_the_run.max()} examples over the run")
    return broken


def _beyond(put_in: np.ndarray, owned: int, clip: Clip, rig: Rig, tolerance: float) -> list[str]:
    """Units, of so many rows each, that reach beyond the clip."""
    values = put_in.reshape(2, -1)
    for first in range(0, values.shape[1], owned):
        alone = np.zeros_like(values)
        alone[:, first : first + owned] = values[:, first : first + owned]
        reach = clip.reach(alone.ravel(), rig.sizes)
        if not reach <= 1 + tolerance:
            return [f"a unit reached {reach:.3g} times as far as its clip"]
    return []
