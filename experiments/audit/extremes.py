"""One user, or one unit, left out of a round of users who all go the same way, whatever updates they have.

What `contributions` looks at lies in directions of its own, and far. Here everybody shares one direction, in which
contributions add up, and updates are such as arithmetic has trouble with.
"""

import dataclasses

import numpy as np

from experiments.audit.canaries import CanaryUsers
from experiments.audit.chains import independent
from experiments.audit.rig import FAR, Rig
from experiments.audit.turns import in_every_turn, turns
from fedsim.plan import Plan

VALUES, MOST_ROWS = 16, 2
"""Values of an update, and a user's rows at most."""
KINDS = ("far", "tiny", "zero", "overflowing", "infinite", "undefined")
"""A user of each; the squares of overflowing updates are beyond float32."""
LITTLE, UNUSUAL = KINDS[1:3], KINDS[3:]


def extremes(plan: Plan, seed: int) -> list[str]:
    """Each user left out of the round of its turn moves the sum by its clipped units at most, and so does a unit."""
    group = min(plan.group_size, MOST_ROWS)
    users = CanaryUsers(np.full(len(KINDS), group), np.repeat(np.arange(len(KINDS)), group))
    alone = dataclasses.replace(independent(plan), sampling_probability=in_every_turn(plan))
    examined = dataclasses.replace(alone, group_size=group).on(users)
    broken: list[str] = []
    with np.errstate(over="ignore", invalid="ignore"):
        for exact, kinds in ((False, KINDS), (True, UNUSUAL)):
            updates = _updates(plan.clip_norm)
            rig = Rig(examined, users, updates, sampling_seed=seed, noise_seed=seed + 1, exact=exact)
            broken += _left_out(rig, kinds, seed)
    return broken


def _updates(clip_norm: float) -> np.ndarray:
    """An update of each kind, float32 [kinds, P]; it uses every value, so every block of a clip."""
    direction = clip_norm / np.sqrt(VALUES) * np.ones(VALUES)
    infinite, undefined = direction.copy(), direction.copy()
    infinite[-1], undefined[-1] = np.inf, np.nan
    rows = [FAR * direction, 1e-6 * direction, 0 * direction, np.full(VALUES, 1e30), infinite, undefined]
    return np.array(rows).astype(np.float32)


def _left_out(rig: Rig, kinds: tuple[str, ...], seed: int) -> list[str]:
    plan, turn = rig.plan, turns(rig.plan, rig.users, seed)
    each = plan.units_per_user(int(rig.users.user_offsets[1]))
    everybody = np.arange(len(KINDS) * each)
    whole = {number: rig.seen(rig.round(), number).sum for number in set(turn.tolist())}
    clip = dataclasses.replace(rig.round().release.clip, order=plan.mechanism.norm_order)
    broken = []
    for kind, units in {*((kind, each) for kind in kinds), (kinds[0], 1)}:
        user = KINDS.index(kind)
        number, own = int(turn[user]), user * each + np.arange(units)
        if kind in LITTLE:  # beside others it would not show what is made of it
            there, gone = (rig.seen(rig.round(units), number).sum for units in (own, own[:0]))
        else:
            there, gone = whole[number], rig.seen(rig.round(np.setdiff1d(everybody, own)), number).sum
        reach = clip.reach(there - gone, rig.sizes)
        # The noise that both carry is in float32, as contributions have it.
        if not reach <= units + 1e-3 + 1e-5 * plan.sum_noise_multiplier:
            broken.append(f"{units} units of {kind} updates, left out, moved the sum by {reach:.3g} clips")
    return sorted(broken)
