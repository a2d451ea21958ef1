"""What a guarantee rests on, compared with what is done: contributions, sampling, noise, counts, state, charges.

An attack must see through the noise, so it finds large faults alone. The checks of promises look at what a round does
with the noise known, and fail by chance less than once in a million.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from experiments.audit.canaries import CanaryUsers
from experiments.audit.charges import charges
from experiments.audit.contributions import contributions
from experiments.audit.extremes import extremes
from experiments.audit.laws import counts, law_known, noises
from experiments.audit.resumptions import resumptions, travels
from experiments.audit.rig import FAR, USERS, WARM_UP, Rig
from experiments.audit.samples import samples
from experiments.audit.turns import in_every_turn
from experiments.audit.words import words
from fedsim.errors import Failure, InvalidInput
from fedsim.plan import Plan
from fedsim.privacy.audit.result import Promise
from fedsim.release import Release

Check = Callable[[Plan, int], list[str]]
"""(plan, seed) → what is wrong, in words."""


def promises(plan: Plan, seed: int) -> list[Promise]:
    """Every check on a plan.

    Args:
        plan: The plan.
        seed: Seed of sampling and noise.
    """
    plan = dataclasses.replace(plan, sampling=plan.scheme)
    law = "of the law that is accounted" if law_known(plan) else "whose law the audit does not know"
    apart = plan.scheme.separation
    in_turn = f", and no user in two rounds less than {apart} apart" if apart > 1 else ""
    again = ", and not again where a release is repeated" if plan.correlation is not None else ""
    checks: dict[str, Check] = {
        "a user puts in no more than clip and group size allow, if sampled, whoever else is there": contributions,
        "a user or a unit that is left out moves the sum by its clip at most, whatever its update": extremes,
        f"units are sampled as often as accounted, anew in every round and whenever one runs again{in_turn}": samples,
        f"every sum gets noise of its own, {law}": noises,
        "what a round does depends on earlier ones through what they released alone": states,
        "a run that goes on from a checkpoint releases what it would have, and no noise twice": resumptions,
        "a plan that is read back from its text is the same, and releases the same": travels,
        "the statement says of clip and noise what is done": words,
        f"a round is charged, on disk, before anybody is asked{again}": charges,
    }
    if plan.clip_rule is not None:
        checks["the count that moves the clip norm is of halves, and gets the noise that is accounted"] = counts
    return [Promise(what=what, broken=faults(check, plan, seed)) for what, check in checks.items()]


def faults(check: Check, plan: Plan, seed: int) -> tuple[str, ...]:
    """Each fault of a plan once; canaries that make a round fail are a fault too.

    Args:
        check: One of those above.
        plan: The plan.
        seed: Seed of sampling and noise.
    """
    try:
        return tuple(dict.fromkeys(check(plan, seed)))
    except (Failure, InvalidInput) as failure:
        return (f"a round could not be run: {str(failure).splitlines()[0]}",)


def states(plan: Plan, seed: int) -> list[str]:
    """A mechanism that learns only what was released knows as much as the round's own, clip norm apart."""
    users = CanaryUsers(np.ones(USERS, dtype=np.int64), np.arange(USERS))
    examined = dataclasses.replace(plan, sampling_probability=in_every_turn(plan) / 2).on(users)
    updates = (FAR * plan.clip_norm * np.eye(USERS)).astype(np.float32)
    rig = Rig(examined, users, updates, sampling_seed=seed, noise_seed=seed + 1)
    round, outsider = rig.round(), Release(examined, rig.sizes, seed + 1)
    for number in range(WARM_UP):
        before = round.parameters.copy()
        rig.seen(round, number)
        outsider.noise.observe(before - round.parameters, before)
        known, learnt = round.release.noise.state(), outsider.noise.state()
        # What was released is read from float32 parameters.
        if not all(
            np.allclose(known[name], learnt[name], rtol=1e-3, atol=1e-3 * _size(known[name])) for name in known
        ):
            return ["the mechanism learnt something that was not released"]
    return []


def _size(values: np.ndarray) -> float:
    return float(np.abs(values).max(initial=0.0))
