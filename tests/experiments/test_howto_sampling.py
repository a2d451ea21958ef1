"""docs/howto-sampling.md, run as its reader would: the code, the commands, and what the page says of them."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import howto_pages
import numpy as np
import pytest
from howto_pages import AUDIT, Fedsim, command, read, written
from small_flags import LOCAL, SMALL

from fedsim.config import PlanConfig
from fedsim.errors import InvalidInput
from fedsim.plan import Plan, plan_from_json
from fedsim.planner import UserSizes
from fedsim.privacy.events import FixedSizeSubsampledGaussian
from fedsim.randomness import stream
from fedsim.sampling import SAMPLINGS, Population

PAGE, NAME = "howto-sampling", "fixed_size:fixed-size"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the page's code."""
    return written(PAGE, "fixed_size", tmp_path_factory.mktemp("sampling"))


@pytest.fixture(scope="module")
def fedsim() -> Iterator[Fedsim]:
    with howto_pages.warm_fedsim() as run:
        yield run


@pytest.fixture
def importable(folder: Path) -> Iterator[None]:
    with howto_pages.importable(folder, SAMPLINGS._classes, NAME):
        yield


def test_training_on_two_ray_workers_states_what_was_done(folder: Path, fedsim: Fedsim) -> None:
    # Three examples a user: 64 gradients are no whole number of users.
    more = ["--plan.group-size", "3", "--plan.rounds", "2", "--evaluation.every", "1", "--output", "run"]
    done = fedsim([*command(PAGE, "train"), *SMALL, *more], folder)
    assert done.returncode == 0, done.stderr
    stated = read(folder / "run" / "privacy.json")
    users = stated["event"]["events"][0]["event"]["population_size"]
    assert stated["sampling"] == {
        "in_words": f"21 of the {users} users join each step, drawn without replacement (fixed-size cohorts)",
        "scheme": NAME,
        "probability": 21 / users,
    }
    assert read(folder / "run" / "summary.json")["units_per_round"] == 21
    assert f"--sampling fixed-size --cohort-size 21 --population-size {users} " in stated["recompute"]
    again = fedsim(stated["recompute"].removeprefix("python -m experiments.run ").split(), folder)
    assert json.loads(again.stdout)["epsilon"] == stated["epsilon"]


def test_comparing_leaves_two_arms_and_a_report(folder: Path, fedsim: Fedsim) -> None:
    arguments = ["--plan.rounds", "2", "--output", "comparison"]
    done = fedsim([*command(PAGE, "compare"), *SMALL, *LOCAL, *arguments], folder)
    assert done.returncode == 0, done.stderr
    arms = read(folder / "comparison" / "comparison.json")["arms"]
    assert [arm["mechanism"] for arm in arms] == ["gaussian", "layer-noise"]
    done = fedsim(["report", "comparison"], folder)
    assert done.returncode == 0, done.stderr


def test_its_audit_passes(folder: Path, fedsim: Fedsim) -> None:
    done = fedsim([*command(PAGE, "audit"), *AUDIT], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BROKEN" not in done.stdout


def planned(**changes: Any) -> Plan:
    config = PlanConfig(sampling=NAME, gradients_per_round=25, noise_multiplier=2.0, **changes)
    return config.for_users(UserSizes.of_quantiles(90, {0.5: 8}))


@pytest.mark.usefixtures("importable")
def test_what_is_drawn_is_what_is_accounted_and_divided_by() -> None:
    plan = planned(group_size=4)
    assert plan.step_event() == FixedSizeSubsampledGaussian(cohort_size=6, population_size=90, noise_multiplier=2.0)
    assert plan.normaliser == 6
    cohorts = [plan.sample(round, 7) for round in range(400)]
    assert all(len(np.unique(cohort)) == 6 and (np.diff(cohort) > 0).all() for cohort in cohorts)
    assert all(cohort.min() >= 0 and cohort.max() < 90 for cohort in cohorts)
    counts = np.bincount(np.concatenate(cohorts), minlength=90)
    assert counts.min() > 5
    assert counts.max() < 60, "each is in 27 cohorts on average"
    assert np.array_equal(plan.sample(3, 7), cohorts[3])
    assert plan_from_json(plan.to_json()) == plan


@pytest.mark.usefixtures("importable")
def test_a_cohort_is_never_empty_and_may_be_everybody() -> None:
    scheme = SAMPLINGS.named(NAME)()
    streams = partial(stream, 1, "cohort")
    population = Population.of_users
    assert len(scheme.draw(population(90), 1e-6, 0, streams)) == scheme.expected_units(90, 1e-6) == 1
    assert scheme.draw(population(5), 1.0, 0, streams).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("importable")
def test_examples_are_refused_with_a_sentence() -> None:
    with pytest.raises(InvalidInput, match=r"poisson with els\. No event is known for its groups"):
        planned(algorithm="els", group_size=2).step_event()
