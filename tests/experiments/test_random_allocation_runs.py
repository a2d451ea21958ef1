"""Random allocation as a scheme: who is drawn, and what is charged and said of rounds of a block, lost ones too."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_flags import LOCAL, SMALL

from experiments.run import main
from fedsim.errors import InvalidInput
from fedsim.plan import ElsPlan, UlsPlan, plan_from_json
from fedsim.privacy.accountant import epsilon_bounds, flatten
from fedsim.privacy.check import charged
from fedsim.privacy.events import (
    Adjacency,
    Composed,
    Event,
    Gaussian,
    OfBlock,
    PoissonSubsampledGaussian,
    RandomAllocatedGaussian,
    Repeated,
)
from fedsim.privacy.ledger import Ledger, merged
from fedsim.sampling import RandomAllocation
from server.round import Budget

COMMON: dict[str, Any] = {"group_size": 2, "clip_norm": 1.0, "noise_multiplier": 0.8, "delta": 1e-5}
BLOCK = RandomAllocatedGaussian(rounds_per_block=4, noise_multiplier=0.8)
AGAIN = PoissonSubsampledGaussian(sampling_probability=0.25, noise_multiplier=0.8)


def plan(users: int = 60, probability: float = 0.25, steps: int = 8, **changes: Any) -> UlsPlan:
    values = {**COMMON, "num_users": users, "sampling_probability": probability, "steps": steps, **changes}
    return UlsPlan(sampling=RandomAllocation(), **values)


def test_every_user_is_in_exactly_one_round_of_each_block() -> None:
    allocated = plan()
    for block in range(5):
        rounds = [allocated.sample(4 * block + place, seed=3) for place in range(4)]
        assert np.array_equal(np.sort(np.concatenate(rounds)), np.arange(60))


def test_rounds_of_a_block_are_equally_likely_for_each_user_and_independent_of_others_and_of_other_blocks() -> None:
    allocated, blocks = plan(users=8), 4000
    place = np.zeros((blocks, 8), dtype=int)
    for number in range(4 * blocks):
        place[number // 4, allocated.sample(number, seed=9)] = number % 4
    slack = 5 * math.sqrt(0.25 * 0.75 / blocks)
    for value in range(4):
        assert (place == value).mean(axis=0) == pytest.approx(0.25, abs=slack)
    together = (place[:, :, None] == place[:, None, :]).mean(axis=0)[np.triu_indices(8, 1)]
    assert together == pytest.approx(0.25, abs=slack)
    assert (place[1:] == place[:-1]).mean(axis=0) == pytest.approx(0.25, abs=slack)


@pytest.mark.parametrize(
    ("probability", "rounds"), [(1.0, 1), (0.5, 2), (1 / 3, 3), (0.1, 10), (0.3, 4), (1 / 49, 49)]
)
def test_a_block_is_as_long_as_the_cohort_asks_and_sums_are_divided_by_its_mean(
    probability: float, rounds: int
) -> None:
    allocated = plan(users=98, probability=probability)
    assert allocated.step_event() == RandomAllocatedGaussian(rounds_per_block=rounds, noise_multiplier=0.8)
    assert allocated.normaliser == pytest.approx(98 / rounds)


def test_a_round_that_was_lost_runs_with_others_and_leaves_the_rest_of_the_block_as_it_was() -> None:
    allocated, users = plan(users=400), 400
    before = [allocated.sample(number, seed=3) for number in range(4)]
    again = [allocated.sample(1, seed=3, attempt=attempt) for attempt in range(1, 200)]
    assert len({tuple(one) for one in (before[1], *again)}) == 200
    counts = np.bincount(np.concatenate(again), minlength=users)
    # Nobody is preferred for having been in the lost round, or for not having been.
    for group in before:
        assert counts[group].mean() == pytest.approx(199 / 4, abs=5 * math.sqrt(199 * 0.1875 / len(group)))
    assert [len(one) for one in again] != [len(again[0])] * 199
    assert np.array_equal(before[2], allocated.sample(2, seed=3))
    both = np.intersect1d(again[0], allocated.sample(2, seed=3, attempt=1))
    assert len(both) == pytest.approx(400 / 16, abs=5 * 5), "lost rounds are of no common block"
    assert len(both)


def test_a_block_is_charged_once_and_each_lost_round_on_top(tmp_path: Path) -> None:
    allocated = plan()
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        budget = Budget(allocated, ledger, math.inf)
        expected: list[tuple[int, Composed]] = [
            (0, merged([BLOCK])),
            (1, merged([BLOCK])),
            (1, merged([BLOCK, AGAIN])),
            (2, merged([BLOCK, AGAIN])),
            (2, merged([BLOCK, AGAIN, AGAIN])),
            (2, merged([BLOCK, AGAIN, AGAIN, AGAIN])),
            (4, merged([BLOCK, BLOCK, AGAIN, AGAIN, AGAIN])),
        ]
        for round, total in expected:
            budget.charge(round)
            assert flatten(ledger.event()) == flatten(total)
            assert charged(entry.event for entry in ledger.entries) == [flatten(total)]
        assert budget.epsilon() == epsilon_bounds(total, allocated.delta).upper


def test_a_block_of_which_only_later_rounds_are_charged_counts_whole() -> None:
    assert flatten(merged([plan().charge(6)])) == {BLOCK: 1}
    assert flatten(OfBlock(event=BLOCK, block=0)) == {BLOCK: 1}
    other = RandomAllocatedGaussian(rounds_per_block=4, noise_multiplier=0.9)
    mixed: list[Event] = [OfBlock(event=BLOCK, block=0), OfBlock(event=other, block=0), Gaussian(noise_multiplier=9.0)]
    assert sum(flatten(merged([*mixed, *mixed])).values()) == 4


def test_what_a_plan_expects_is_what_its_rounds_are_charged() -> None:
    for steps in (1, 3, 4, 5, 8, 9):
        allocated = plan(steps=steps)
        assert flatten(allocated.event()) == flatten(merged(allocated.charge(round) for round in range(steps)))
        assert allocated.event() == Repeated(event=BLOCK, count=-(-steps // 4))


def test_a_budget_that_holds_one_block_ends_before_the_next(tmp_path: Path) -> None:
    allocated = plan()
    limit = epsilon_bounds(BLOCK, allocated.delta).upper
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        budget = Budget(allocated, ledger, limit)
        for round in range(4):
            assert budget.affords(round)
            budget.charge(round)
        assert not budget.affords(3), "again, it would cost more"
        assert not budget.affords(4)


def test_groups_replaced_users_correlated_noise_and_other_noise_are_refused() -> None:
    values = {**COMMON, "num_examples": 100, "num_users": 50, "sampling_probability": 0.1, "steps": 3}
    names = {name: value for name, value in values.items() if name in ElsPlan.__dataclass_fields__}
    with pytest.raises(InvalidInput, match="sampling"):
        ElsPlan(sampling=RandomAllocation(), **names).step_event()
    with pytest.raises(InvalidInput, match="adjacency"):
        plan(adjacency=Adjacency.REPLACE_ONE_USER).epsilon()
    with pytest.raises(InvalidInput):
        plan(noise_coefficients=(1.0, 0.5))
    with pytest.raises(InvalidInput, match="sampling"):
        RandomAllocation().charge(Gaussian(noise_multiplier=1.0), 0)


def test_a_run_states_its_blocks_and_the_second_method_confirms_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    flags = [
        *SMALL,
        *LOCAL,
        "--plan.sampling",
        "random-allocation",
        "--plan.algorithm",
        "uls",
        "--output",
        str(folder),
    ]
    assert main(["train", *flags]) == 0
    stated = json.loads((folder / "privacy.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    run_plan = plan_from_json(json.dumps(config["plan"]))
    rounds = RandomAllocation().rounds_per_block(run_plan.sampling_probability)
    assert f"exactly one of every {rounds} steps" in json.dumps(stated, ensure_ascii=False)
    assert stated["steps"] == run_plan.steps
    capsys.readouterr()
    assert f"--rounds-per-block {rounds}" in stated["recompute"]
    assert main(shlex.split(stated["recompute"])[3:]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"]["upper"] == pytest.approx(stated["epsilon"]["upper"])
    assert main(["account", "--check", str(folder)]) == 0
