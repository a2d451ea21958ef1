"""Whether the privacy statement says of clip and noise what a round does."""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

from experiments.audit.canaries import CanaryUsers
from experiments.audit.chains import independent
from experiments.audit.laws import DEVIATIONS, NOISE_VALUES, nobody
from experiments.audit.rig import FAR, OnlyRound, Rig
from experiments.audit.turns import in_every_turn, turns
from fedsim.plan import ALL_EXAMPLES, Plan
from fedsim.privacy.bounds import Bounds
from fedsim.privacy.events import Composed
from fedsim.statement import PrivacyStatement

NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
SIZES_OF_NOISE: dict[str, Callable[[np.ndarray], float]] = {
    rf"standard deviation {NUMBER}": lambda values: float(np.sqrt(np.mean(values**2))),
    rf"of scale {NUMBER}(?![\d./e])": lambda values: float(np.abs(values).mean()),  # scale 1/S is no number
}
"""How a sentence names a size of noise, and how that is measured on values of mean 0."""
ROUNDING = 1e-4
"""Relative: numbers in words have six digits."""


def words(plan: Plan, seed: int) -> list[str]:
    """The statement's numbers against the sum of nobody, and against that of one unit far beyond its clip."""
    plan = independent(plan)
    rig, round = nobody(plan, 1, NOISE_VALUES, seed, seed + 1)
    statement = _statement(plan, rig)
    return _of_noise(statement.mechanism, rig, round) + _of_clip(statement.contribution_bound, plan, seed)


def _statement(plan: Plan, rig: Rig) -> PrivacyStatement:
    """The statement of a run before its first round; of ε it is asked nothing."""
    nothing = Composed(events=())
    return PrivacyStatement(
        plan=plan,
        sizes=rig.sizes,
        event=nothing,
        own=nothing,
        steps=0,
        epsilon=Bounds(lower=0.0, upper=math.inf),
        not_covered=(),
        versions={},
        ledger="",
    )


def _of_noise(sentence: str, rig: Rig, round: OnlyRound) -> list[str]:
    """The size of the noise of the first round's sum, its scales divided out."""
    scales = rig.units_of_noise(round) / round.release.clip.norm
    noise = rig.seen(round, 0).sum / scales
    silent = "no noise is added" in sentence
    if silent == bool(noise.any()):
        return [f'noise is {"" if silent else "not "}added, and the statement says "{sentence}"']
    named = [(found, size) for pattern, size in SIZES_OF_NOISE.items() if (found := re.search(pattern, sentence))]
    for found, size in named:
        stated, measured = float(found[1]), size(noise)
        if not abs(measured / stated - 1) <= DEVIATIONS / math.sqrt(NOISE_VALUES):
            return [f"the statement says {found[0]}, and it is {measured:.3g}"]
    if not (named or silent or re.search(r"\d", sentence)):
        return [f'the statement does not say how large the noise is: "{sentence}"']
    return []


def _of_clip(sentence: str, plan: Plan, seed: int) -> list[str]:
    """Norm, order and group size, and how far one unit reaches."""
    found = re.search(rf"L{NUMBER} norm {NUMBER}", sentence)
    if found is None:
        return [f'the statement does not say to which norm a unit is clipped: "{sentence}"']
    order, norm = int(found[1]), float(found[2])
    broken = []
    used = "all" if plan.group_size >= ALL_EXAMPLES else f"at most {plan.group_size}"
    if f"{used} of a user's examples" not in sentence:
        broken.append(f'a user may have {plan.group_size} examples, and the statement says "{sentence}"')
    users = CanaryUsers(np.ones(1, dtype=np.int64), np.zeros(1))
    certain = dataclasses.replace(plan.on(users), sampling_probability=in_every_turn(plan))
    updates = (FAR * plan.clip_norm * np.random.default_rng(seed).standard_normal((1, 24))).astype(np.float32)
    rig = Rig(certain, users, updates, sampling_seed=seed, noise_seed=seed + 1)
    number = int(turns(certain, users, seed)[0])
    inside, outside = rig.round(), rig.round(np.empty(0, dtype=np.int64))
    clip, each = inside.release.clip, rig.units_of_noise(inside)  # before the round, which may move the clip norm
    if (order, math.isclose(norm, plan.clip_norm, rel_tol=ROUNDING)) != (clip.order, True):
        broken.append(f"a unit is clipped to L{clip.order} norm {plan.clip_norm:g}, and the statement says {found[0]}")
    moved = (rig.seen(inside, number).sum - rig.seen(outside, number).sum) / each
    reach = float(np.linalg.norm(moved, order)) * clip.norm
    if not reach <= norm * (1 + 1e-3 + 1e-5 * plan.sum_noise_multiplier):
        broken.append(f"a unit reached L{order} norm {reach:.4g}, and the statement says {found[0]}")
    return broken
