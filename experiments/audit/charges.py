"""What stands in the ledger on disk at the moment when workers are asked, and what a round does that runs again."""

import dataclasses
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from experiments.audit.canaries import CanaryUsers
from experiments.audit.rig import OnlyRound, Rig, state_of, without_gradients
from experiments.audit.turns import in_every_turn
from fedsim.engine.work import Gathered, Work
from fedsim.errors import Failure
from fedsim.plan import Plan
from fedsim.privacy.ledger import MODEL_UPDATE, Ledger, LedgerEntry, read_entries
from fedsim.release import ReleaseLog


class Lost(Failure):
    """A round that ends after it was charged, and before anything is released."""


def charges(plan: Plan, seed: int) -> list[str]:
    """What the ledger on disk holds at the moment when workers are asked; one round is lost and runs again."""
    users = CanaryUsers(np.ones(2, dtype=np.int64), np.zeros(2))
    examined = dataclasses.replace(plan.on(users), sampling_probability=in_every_turn(plan))
    broken = _charges(examined, users, seed, seed + 1)
    if plan.bands > 1 and plan.mechanism.secure:  # whose noise cannot be drawn again, and must be kept
        broken += [f"{fault} (secure noise)" for fault in _charges(examined, users, seed, None)]
    return broken


def _charges(plan: Plan, users: CanaryUsers, seed: int, noise_seed: int | None) -> list[str]:
    rig = without_gradients(plan, users, 2, seed, noise_seed)
    with tempfile.TemporaryDirectory() as folder, Ledger.open(Path(folder) / "ledger.jsonl") as ledger:
        asking = Asking(rig, ledger)
        if plan.correlation is not None:
            _of_a_chain(asking, Path(folder) / "releases")
        else:
            round = rig.round(charges=ledger)
            for number in (0, 1, 1):
                asking.begun.append(number)
                round.run(number, asking.gather)
    return asking.broken


class Asking:
    """Rounds whose workers are asked under the eyes of the auditor.

    Args:
        rig: The rig.
        ledger: Where rounds are charged.

    Attributes:
        begun: Rounds that must stand in the ledger, in order.
        asked: How often somebody was asked.
        broken: What was found.
    """

    def __init__(self, rig: Rig, ledger: Ledger) -> None:
        self.rig, self.ledger = rig, ledger
        self.begun: list[int] = []
        self.asked = 0
        self.broken: list[str] = []

    def gather(self, request: Work, costs: np.ndarray, **following: Any) -> Gathered:
        """What the dispatcher gathers, once the ledger has been read."""
        self.asked += 1
        entries = _charged(self.ledger.path)
        if [entry.round for entry in entries] != self.begun:
            self.broken.append("a round was asked for without being charged")
        before = Counter[int]()
        expected = []
        for entry in entries:
            expected.append(self.rig.plan.charge(entry.round, before[entry.round]))
            before[entry.round] += 1
        if [entry.event for entry in entries] != expected:
            self.broken.append("a round was charged as something else than the plan's step")
        return self.rig.gather(request, costs, **following)

    def lose(self, request: Work, costs: np.ndarray, **following: Any) -> Gathered:
        """The same, of a round that ends then."""
        self.gather(request, costs, **following)
        raise Lost("the server went away")


def _charged(path: Path) -> list[LedgerEntry]:
    """What a ledger on disk was charged with, without what was noted in it."""
    return [entry for entry in read_entries(path) if entry.purpose == MODEL_UPDATE]


def _of_a_chain(asking: Asking, folder: Path) -> None:
    """Rounds of correlated noise: one is lost before it is released, and with the one after it when it was."""
    rig, begun = asking.rig, asking.begun

    def resumed(state: dict[str, np.ndarray]) -> OnlyRound:
        round = rig.round(charges=asking.ledger, log=ReleaseLog(folder))
        round.load_state(state)
        return round

    round = rig.round(charges=asking.ledger, log=ReleaseLog(folder))
    begun.append(0)
    round.run(0, asking.gather)
    state = state_of(round)
    begun.append(1)
    try:
        round.run(1, asking.lose)
    except Lost:
        round = resumed(state)
    round.run(1, asking.gather)  # by the charge that it has
    begun.append(2)
    round.run(2, asking.gather)
    reached, asked = state_of(round), asking.asked
    round = resumed(state)
    for number in (1, 2):
        round.run(number, asking.gather)
    if not all(np.array_equal(array, reached[name]) for name, array in round.state().items()):
        asking.broken.append("a round that was released ended elsewhere when it ran again")
    if asking.asked != asked:
        asking.broken.append("somebody was asked again for a round that was released")
    begun.append(3)
    round.run(3, asking.gather)
    if [entry.round for entry in _charged(asking.ledger.path)] != begun:
        asking.broken.append("a round that had its charge was charged again")
    if round.seeds.noise is not None:
        whole = rig.round()
        for number in range(4):
            whole.run(number, rig.gather)
        if not np.array_equal(whole.parameters, round.parameters):
            asking.broken.append("rounds that were lost and ran again ended elsewhere than those that were not")
