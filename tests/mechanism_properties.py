"""What a mechanism owes, whatever it is: a class of tests that each mechanism's own inherits.

What is looked at stands in experiments/audit, whose command asks the same of any plan; here it is asked by property,
of both algorithms, and of options and other processes too.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from typing import ClassVar

import releases_elsewhere

from experiments.audit.attacks import always_sampled, many_runs
from experiments.audit.contributions import contributions
from experiments.audit.extremes import extremes
from experiments.audit.laws import noises
from experiments.audit.promises import Check, faults, states
from experiments.audit.resumptions import resumptions, travels
from experiments.audit.words import words
from fedsim.plan import ElsPlan, Plan, UlsPlan
from fedsim.privacy.mechanisms import MECHANISMS, Mechanism

SEED = 3
COMMON = {"group_size": 2, "clip_norm": 0.7, "noise_multiplier": 1.3, "sampling_probability": 0.25, "steps": 12}


class MechanismProperties:
    """The tests of one mechanism.

    Attributes:
        name: Its name, module:name for one outside the package.
        options: As --plan.mechanism-options takes them.
    """

    name: ClassVar[str] = ""
    options: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def mechanism(cls) -> Mechanism:
        return MECHANISMS.build(cls.name, cls.options)

    @classmethod
    def plans(cls) -> tuple[Plan, Plan]:
        """A plan of each algorithm."""
        uls = UlsPlan(num_users=40, delta=1e-5, mechanism=cls.mechanism(), **COMMON)
        return uls, ElsPlan(num_examples=80, delta=1e-5, mechanism=cls.mechanism(), **COMMON)

    def keeps(self, *checks: tuple[Check, Plan]) -> None:
        found = [f"{plan.name}: {fault}" for check, plan in checks for fault in faults(check, plan, SEED)]
        assert not found, "\n".join(found)

    def test_a_user_or_unit_left_out_moves_the_sum_by_its_clip_at_most(self) -> None:
        uls, els = self.plans()  # one each, for a unit is a user's in the former alone, and they take time
        self.keeps((contributions, uls), (extremes, els))

    def test_every_sum_gets_noise_of_its_own_of_the_law_that_is_accounted(self) -> None:
        self.keeps(*((noises, plan) for plan in self.plans()))

    def test_the_statement_says_what_is_done(self) -> None:
        self.keeps(*((words, plan) for plan in self.plans()))

    def test_the_worst_canary_does_not_contradict_the_certified_epsilon(self) -> None:
        for plan in self.plans():
            # Under much noise few trials tell.
            noised = dataclasses.replace(always_sampled(plan), noise_multiplier=4.0)
            found = many_runs(plan.name, noised, 24, 0.999, SEED)
            assert not found.contradicts, found.in_words()
            assert found.epsilon_lower <= found.epsilon_certified

    def test_a_run_goes_on_as_it_would_have_and_reuses_no_noise(self) -> None:
        self.keeps(*((check, plan) for check in (states, resumptions) for plan in self.plans()))

    def test_its_plan_travels(self) -> None:
        mechanism = self.mechanism()
        again = MECHANISMS.from_values(json.loads(json.dumps(MECHANISMS.values_of(mechanism))))
        assert again == mechanism, f"{mechanism} comes back as {again}"
        assert {option.partition("=")[0] for option in self.options} <= set(type(mechanism).options())
        self.keeps(*((travels, plan) for plan in self.plans()))

    def test_another_process_draws_the_same_noise(self) -> None:
        for plan in self.plans():
            text = plan.to_json()
            here = releases_elsewhere.digest_of_releases(text)
            assert _elsewhere(self.together())[text] == here, "another process releases something else"

    @classmethod
    def together(cls) -> tuple[str, ...]:
        """Plans of all mechanisms whose tests stand beside this one's: one process answers for all."""
        beside = {kind for kind in MechanismProperties.__subclasses__() if kind.__module__ == cls.__module__} | {cls}
        return tuple(sorted(plan.to_json() for kind in beside if kind.name for plan in kind.plans()))


@functools.cache
def _elsewhere(texts: tuple[str, ...]) -> dict[str, str]:
    """The same from a process of its own, with other hashes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "1"}
    done = subprocess.run(
        [sys.executable, releases_elsewhere.__file__],
        input=json.dumps(texts),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found
