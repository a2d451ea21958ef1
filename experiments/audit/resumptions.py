"""A run that goes on from what was kept of it, here or in another place."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from experiments.audit.canaries import CanaryUsers
from experiments.audit.chains import independent
from experiments.audit.laws import DEVIATIONS, nobody
from experiments.audit.rig import USERS, WARM_UP, OnlyRound, Rig, state_of, without_gradients
from fedsim.plan import Plan, plan_from_json
from server import checkpoint as checkpoints
from server.checkpoint import Checkpoint

VALUES, ROUNDS = 1024, 2
"""Values of a sum, and rounds that run again."""


def resumptions(plan: Plan, seed: int) -> list[str]:
    """Rounds go on from a checkpoint as they went on before it was read; those that run again get other noise."""
    # Noise that is correlated must run again as it was: laws and charges look at that.
    rig, round = nobody(independent(plan), 1, VALUES, seed, seed + 1)
    draws = [_next(rig, round, number) for number in range(WARM_UP)]
    kept = _through_a_file(state_of(round))
    after = range(WARM_UP, WARM_UP + ROUNDS)
    draws += [_next(rig, round, number) for number in after]

    def resumed(charges: bool) -> list[np.ndarray]:
        other = rig.round(round.present, round.budget.ledger if charges else None)
        other.load_state(kept)
        return [_next(rig, other, number) for number in after]

    broken = []
    if not np.array_equal(resumed(charges=False), draws[WARM_UP:]):
        broken.append("a run that was resumed did not go on as one that was not")
    if plan.noise_multiplier > 0:
        between = np.abs(np.corrcoef(draws + resumed(charges=True))[: len(draws), len(draws) :])
        if not between.max() <= DEVIATIONS / np.sqrt(VALUES):
            broken.append("a round that ran again, in a run that was resumed, got the noise of another sum")
    return broken


def travels(plan: Plan, seed: int) -> list[str]:
    """The plan as workers and whoever reads a run's folder get it: as text."""
    again = plan_from_json(plan.to_json())
    if again != plan:
        return ["the plan that is read back from its text is another one"]
    users = CanaryUsers(np.ones(USERS, dtype=np.int64), np.zeros(USERS))
    sums = []
    for one in (plan, again):
        rig = without_gradients(dataclasses.replace(one).on(users), users, VALUES, seed, seed + 1)
        round = rig.round()
        sums.append([rig.seen(round, number).sum for number in range(ROUNDS)])
    same = np.array_equal(sums[0], sums[1])
    return [] if same else ["the plan that is read back from its text releases something else"]


def _next(rig: Rig, round: OnlyRound, number: int) -> np.ndarray:
    """The noise of the next round over its clip norm and scales."""
    each = rig.units_of_noise(round)
    noise: np.ndarray = rig.seen(round, number).sum / each
    return noise


def _through_a_file(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoints.write(Path(folder), Checkpoint(round=0, arrays=state, values={}))
        return {name: np.array(array) for name, array in checkpoints.read(path).arrays.items()}
