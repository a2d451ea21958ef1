"""What several models cost together: composed where they are independent, and not stated where they are not."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments.compare import Compare
from experiments.together import FinishedRun, Together
from fedsim.errors import InvalidInput
from fedsim.plan import UlsPlan
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import Adjacency, Composed, Repeated
from fedsim.privacy.ledger import Ledger, LedgerDamaged

PLAN = UlsPlan(
    num_users=1000,
    sampling_probability=0.05,
    group_size=1,
    clip_norm=1.0,
    noise_multiplier=1.1,
    steps=20,
    delta=1e-5,
)
OTHER = dataclasses.replace(PLAN, noise_multiplier=1.7)


def run(name: str, plan: UlsPlan = PLAN, steps: int = 20, **seeds: int) -> FinishedRun:
    charged = Composed(events=(Repeated(event=plan.step_event(), count=steps),) if plan.noise_multiplier else ())
    return FinishedRun(name=name, plan=plan, charged=charged, seeds=seeds)


def test_independent_models_cost_the_composition_of_all_that_their_ledgers_hold() -> None:
    together = Together.of([run("one"), run("two", OTHER, steps=23)])
    both = Composed(events=(Repeated(event=PLAN.step_event(), count=20), Repeated(event=OTHER.step_event(), count=23)))
    assert together.epsilon == epsilon_bounds(both, 1e-5)
    assert together.epsilon is not None
    assert together.epsilon.upper > epsilon_bounds(Repeated(event=PLAN.step_event(), count=20), 1e-5).upper
    words = together.in_words()
    assert "the model of its own arm alone" in words
    assert f"Releasing all 2 models costs what they cost together: {together.guarantee}, user-level" in words
    assert float(together.guarantee.strip("()").split(",")[0]) >= together.epsilon.upper, "shown rounded up"
    assert not together.warning()


@pytest.mark.parametrize("kind", ["sampling", "noise"])
@pytest.mark.parametrize("seed", [0, -1, 7])
def test_runs_that_share_a_seed_are_not_composed(kind: str, seed: int) -> None:
    own = {"noise": "sampling", "sampling": "noise"}[kind]
    runs = [run(name, **{kind: seed, own: place}) for place, name in enumerate(("one", "two"), start=10)]
    together = Together.of([*runs, run("three", sampling=1, noise=1), run("four")])
    assert together.epsilon is None
    assert together.unclaimed.startswith(f"one and two each share the {kind} seed of another")
    assert together.to_json()["epsilon"] == {"upper": None, "lower": None}
    assert "No ε is stated for releasing all 4 models" in together.in_words()
    with pytest.raises(ValueError, match="nothing is claimed"):
        _ = together.guarantee
    assert Together.of([runs[0], run("three", sampling=1, noise=1), run("four")]).epsilon is not None


def test_runs_without_seeds_are_independent_and_known_seeds_are_told() -> None:
    assert Together.of([run("one"), run("two")]).epsilon is not None
    assert "none of their models may be released" in Together.of([run("one"), run("two", noise=3)]).in_words()
    assert "the sampling hides nobody" in Together.of([run("one"), run("two", sampling=3)]).in_words()


def test_one_model_without_privacy_leaves_no_guarantee_for_all() -> None:
    free = run("free", dataclasses.replace(PLAN, noise_multiplier=0.0))
    together = Together.of([run("one"), free])
    assert together.epsilon is None
    assert together.unclaimed == "free was trained without privacy"


def test_guarantees_of_different_changes_are_not_added_up() -> None:
    replacing = dataclasses.replace(PLAN, adjacency=Adjacency.REPLACE_ONE_USER)
    assert Together.of([run("one"), run("two", replacing)]).epsilon is None


def test_what_a_folder_lacks_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="folder"):
        FinishedRun.read("none", tmp_path / "none")
    with pytest.raises(InvalidInput, match="finished run"):
        FinishedRun.read("empty", tmp_path)
    written = {"config": {"sampling-seed": 3}, "plan": PLAN.to_values()}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        ledger.charge(PLAN.step_event(), round=0)
    read = FinishedRun.read("run", tmp_path)
    assert (read.plan, dict(read.seeds)) == (PLAN, {"sampling": 3})
    assert read.charged.events == (Repeated(event=PLAN.step_event(), count=1),)
    path = tmp_path / "ledger.jsonl"
    path.write_text(path.read_text().replace('"round": 0', '"round": 1'))
    with pytest.raises(LedgerDamaged):
        FinishedRun.read("run", tmp_path)
    path.unlink()
    with pytest.raises(InvalidInput, match="ledger"):
        FinishedRun.read("run", tmp_path)


def test_arms_of_a_comparison_have_seeds_of_their_own(tmp_path: Path) -> None:
    compare = Compare(sampling_seed=1, noise_seed=1, mechanisms=("gaussian", "layer-noise"))
    arms = [compare.arm(arm, tmp_path, mechanism) for mechanism in compare.mechanisms for arm in ("uls", "els")]
    seeds = [seed for arm in arms for seed in (arm.sampling_seed, arm.noise_seed)]
    assert len(set(seeds)) == 8
    assert compare.arm("uls", tmp_path, "gaussian") == arms[0], "the same when it goes on"
    drawn = Compare(noise_seed=1).arm("uls", tmp_path)
    assert (drawn.sampling_seed, drawn.noise_seed is None) == (None, False)
