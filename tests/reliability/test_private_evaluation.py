"""Real runs that release how held-out users' losses changed: charged, resumed, stated, confirmed; no more is told."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import ROUNDS, trained

from experiments.confirmation import confirm_folder
from experiments.report.run import write_report
from fedsim.config import EvaluationConfig, NoiseConfig, RunConfig
from fedsim.models.config import ModelConfig
from fedsim.plan import UlsPlan
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import Gaussian, Repeated
from fedsim.privacy.held_out import PrivateEvaluation
from fedsim.privacy.ledger import MODEL_UPDATE, Ledger, read_entries
from fedsim.privacy.splits import HELD_OUT, TRAINING, OfSplit
from fedsim.seeds import Seeds
from server.budget import Budget
from server.evaluation import HeldOut, Measurement
from server.private_evaluation import EVALUATION, TOLD, PrivateChanges, rows_measured, users_measured
from server.training import Training

PRIVATE = EvaluationConfig(every=3, max_rows=20, test_rows=20, private=True)
MEASURED = [*range(3, ROUNDS, 3), ROUNDS]
UNNOISED = ("loss", "perplexity", "accuracy")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def told(folder: Path) -> dict[int, float]:
    return {line["round"]: line["private_change"] for line in lines(folder) if "private_change" in line}


def test_a_run_charges_tells_and_states_its_evaluations(small_run, tmp_path: Path, capsys) -> None:
    plain = trained(small_run(tmp_path / "plain"))
    summary = trained(small_run(tmp_path / "run", evaluation=PRIVATE))
    assert list(told(tmp_path / "run")) == [0, *MEASURED]
    assert told(tmp_path / "run")[0] == 0.0
    assert summary["private_change"] == told(tmp_path / "run")[ROUNDS]
    assert summary["test_loss_after"] == plain["test_loss_after"]  # training goes its way

    entries = read_entries(tmp_path / "run/ledger.jsonl")
    charges = [entry for entry in entries if entry.purpose == EVALUATION]
    assert [entry.round for entry in charges] == MEASURED
    assert all(isinstance(entry.event, OfSplit) and entry.event.split == HELD_OUT for entry in charges)
    assert {entry.event.split for entry in entries if entry.purpose == MODEL_UPDATE} == {TRAINING}
    values = json.loads((tmp_path / "run/config.json").read_text())["identity"]["private_evaluation"]
    evaluation = PrivateEvaluation(**values)
    assert epsilon_bounds(evaluation.event, 1e-3).upper <= 2.0
    assert {entry.event.event for entry in charges} == {evaluation.release_event}
    places = {entry.round: place for place, entry in enumerate(entries) if entry.purpose == EVALUATION}
    assert all(places[entry.round] < place for place, entry in enumerate(entries) if entry.purpose == TOLD)

    stated = json.loads((tmp_path / "run/privacy.json").read_text())
    alone = json.loads((tmp_path / "plain/privacy.json").read_text())
    assert stated["epsilon"] == alone["epsilon"] == stated["private_evaluation"]["epsilon"]["training"]
    assert stated["steps"] == ROUNDS
    assert stated["recompute"].startswith("python -m experiments.run account --ledger")
    held_out = epsilon_bounds(Repeated(event=evaluation.release_event, count=len(MEASURED)), 1e-3)
    assert stated["private_evaluation"]["epsilon"]["held-out"]["upper"] == held_out.upper
    assert f"{evaluation.standard_deviation:.3g} nats" in stated["in_words"]
    assert "users held out for validation" in stated["public_sizes"]
    assert stated["private_evaluation"]["in_words"] in (tmp_path / "run/README.md").read_text()
    assert "private change of the loss" in write_report(tmp_path / "run").read_text(encoding="utf-8")
    capsys.readouterr()
    assert confirm_folder(tmp_path / "run", (), as_json=False) == 0
    said = capsys.readouterr().out
    assert "confirmed: for held-out users ε ≤ " in said
    assert "confirmed: for training users ε ≤ " in said


def test_a_statement_that_understates_held_out_users_is_contradicted(small_run, tmp_path: Path) -> None:
    trained(small_run(tmp_path / "run", evaluation=PRIVATE))
    path = tmp_path / "run/privacy.json"
    stated = json.loads(path.read_text())
    stated["private_evaluation"]["epsilon"]["held-out"] = {"lower": 0.1, "upper": 0.2}
    path.write_text(json.dumps(stated))
    with pytest.raises(Exception, match=r"for held-out users ε ≤ 0\.2"):
        confirm_folder(tmp_path / "run", (), as_json=False)


@pytest.mark.parametrize("secure", [False, True])
def test_in_release_mode_nothing_else_is_told_of_held_out_users(
    small_run, tmp_path: Path, secure: bool, capfd, monkeypatch
) -> None:
    def never(self: HeldOut, parameters: Any) -> Measurement:
        raise AssertionError("test users are measured")

    monkeypatch.setattr(HeldOut, "test", never)
    unknown = {"sampling_seed": None, "noise_seed": None, "noise": NoiseConfig(secure=secure)}
    summary = trained(small_run(tmp_path / "run", evaluation=PRIVATE, release=True, **unknown))
    for line in lines(tmp_path / "run"):
        assert not set(UNNOISED) & set(line)
        assert not line["not_private"]
    assert all(value is None for name, value in summary.items() if name.startswith("test_"))
    assert summary["private_change"] is not None
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert f"{abs(summary['private_change']):.4f} nats" in page
    said = capfd.readouterr()
    assert "accuracy" not in said.out + said.err
    assert "with noise of standard deviation" in said.out + said.err


class Crash(RuntimeError):
    pass


@pytest.mark.parametrize("at", [3, 6, ROUNDS])
@pytest.mark.parametrize("when", ["charged", "told", "written"])
def test_a_resumed_run_tells_the_same_numbers_and_charges_each_once(
    small_run, tmp_path: Path, monkeypatch, at: int, when: str
) -> None:
    trained(small_run(tmp_path / "whole", evaluation=PRIVATE))
    charge, tell, crashed = Ledger.charge, Training._tell, []

    def charged(self: Ledger, event: Any, *, round: int, purpose: str = MODEL_UPDATE, note: str = "") -> Any:
        entry = charge(self, event, round=round, purpose=purpose, note=note)
        if round == at and purpose == {"charged": EVALUATION, "told": TOLD}.get(when) and not crashed:
            crashed.append(1)
            raise Crash
        return entry

    def written(self: Training, record: dict[str, Any]) -> None:
        tell(self, record)
        if when == "written" and record["round"] == at and not crashed:
            crashed.append(1)
            raise Crash

    monkeypatch.setattr(Ledger, "charge", charged)
    monkeypatch.setattr(Training, "_tell", written)
    config: RunConfig = small_run(tmp_path / "run", evaluation=PRIVATE)
    with pytest.raises(Crash):
        trained(config)
    trained(dataclasses.replace(config, resume=str(tmp_path / "run"), output=None))
    assert told(tmp_path / "run") == told(tmp_path / "whole")
    entries = read_entries(tmp_path / "run/ledger.jsonl")
    assert sorted(entry.round for entry in entries if entry.purpose == EVALUATION) == MEASURED
    assert confirm_folder(tmp_path / "run", (), as_json=True) == 0


def test_what_held_out_users_paid_is_carried_on_and_charged_to_everybody(small_run, tmp_path: Path) -> None:
    trained(small_run(tmp_path / "first", evaluation=PRIVATE))
    model = ModelConfig(path=str(tmp_path / "first"))
    trained(small_run(tmp_path / "next", evaluation=PRIVATE, model=model))
    first, then = (json.loads((tmp_path / name / "privacy.json").read_text()) for name in ("first", "next"))
    for split, before in first["private_evaluation"]["epsilon"].items():
        both = then["private_evaluation"]["epsilon"][split]["upper"]
        assert both > before["upper"]
        # Who is held out now may have been trained on: that of the earlier run counts at its larger side.
        assert both > first["epsilon"]["upper"]
    assert confirm_folder(tmp_path / "next", (), as_json=True) == 0


def test_evaluations_leave_the_budget_of_training_as_it_is(tmp_path: Path) -> None:
    values: dict[str, Any] = {"num_users": 50, "sampling_probability": 0.2, "group_size": 2, "clip_norm": 1.0}
    plan = UlsPlan(**values, noise_multiplier=1.0, steps=3, delta=1e-3)
    limit = epsilon_bounds(plan.event(3), plan.delta).upper
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        budget = Budget(plan, ledger, limit, splits=True)
        for round in range(3):
            assert budget.affords(round)
            budget.charge(round)
            ledger.charge(
                OfSplit(event=Gaussian(noise_multiplier=0.1), split=HELD_OUT), round=round, purpose=EVALUATION
            )
        assert not budget.affords(3)
        assert budget.epsilon() > limit  # of held-out users, who are charged beyond what any run calibrates


EVALUATION_OF_THREE = PrivateEvaluation(noise_multiplier=3.0, clip_norm=1.0, count=3, users=4)


def measured(losses: list[float]) -> Measurement:
    return Measurement(
        loss=0.0, accuracy=0.0, perplexity=0.0, user_losses=np.array(losses), users=np.arange(len(losses))
    )


def changes_in(folder: Path, seeds: Seeds) -> PrivateChanges:
    made = PrivateChanges(EVALUATION_OF_THREE, Ledger.open(folder / "ledger.jsonl"), seeds, np.arange(4))
    made.told(0, measured([1.0] * 4), np.zeros(3, np.float32), last=False)
    return made


@pytest.mark.parametrize("noise", [5, None])
def test_another_model_of_a_lost_round_has_a_charge_and_noise_of_its_own(tmp_path: Path, noise: int | None) -> None:
    changes = changes_in(tmp_path, Seeds(sampling=1, noise=noise))
    one, other = np.ones(3, np.float32), np.full(3, 2, np.float32)
    first = changes.told(2, measured([0.5] * 4), one, last=False)
    assert changes.told(2, measured([9.0] * 4), one, last=False) == first  # what was told of this model, and no more
    again = changes.told(2, measured([0.5] * 4), other, last=False)
    assert first is not None
    assert again is not None
    assert first != again
    entries = read_entries(tmp_path / "ledger.jsonl")
    assert sum(entry.purpose == EVALUATION for entry in entries) == 2
    # One is left, and it is the last model's.
    assert changes.told(4, measured([0.5] * 4), np.full(3, 4, np.float32), last=False) is None
    assert changes.alarm is not None
    assert changes.alarm[0] == "no-private-change"
    assert changes.told(6, measured([0.5] * 4), np.full(3, 6, np.float32), last=True) is not None
    assert changes.told(7, measured([0.5] * 4), np.full(3, 7, np.float32), last=True) is None
    assert sum(one.purpose == EVALUATION for one in read_entries(tmp_path / "ledger.jsonl")) == 3


def test_no_two_rounds_have_the_same_noise(tmp_path: Path) -> None:
    changes = changes_in(tmp_path, Seeds(sampling=1, noise=5))
    values = [
        changes.told(round, measured([0.5] * 4), np.full(3, round, np.float32), last=round == 3) for round in (1, 2, 3)
    ]
    noises = [value + 0.5 for value in values if value is not None]
    assert len({round(noise, 6) for noise in noises}) == 3


class Users:
    """A split of users that own so many rows each."""

    def __init__(self, owned: list[int]) -> None:
        self.user_offsets = np.concatenate([[0], np.cumsum(owned)]).astype(np.int64)
        self.num_users, self.num_rows = len(owned), int(sum(owned))


def test_a_users_rows_are_its_first_whoever_else_there_is() -> None:
    owned = [3, 1, 0, 7, 2]
    for most in (1, 2, 5):
        rows = rows_measured(Users(owned), np.arange(5), most)
        fewer = rows_measured(Users(owned[1:]), np.arange(4), most)
        own = [row for row in rows if row >= 3]
        np.testing.assert_array_equal(np.array(own) - 3, fewer)
        assert len(rows) == sum(min(one, most) for one in owned)
    np.testing.assert_array_equal(rows_measured(Users(owned), np.array([0, 3]), 2), [0, 1, 4, 5])


def test_each_user_joins_by_a_draw_of_their_own() -> None:
    counts = np.zeros(40)
    sizes = []
    for seed in range(2000):
        drawn = users_measured(40, 10, seed)
        counts[drawn] += 1
        sizes.append(len(drawn))
    assert np.abs(counts / 2000 - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 2000)
    assert np.var(sizes) == pytest.approx(40 * 0.25 * 0.75, rel=0.2)  # independent: a sample of fixed size has none
    joined = np.array([np.isin([3, 4], users_measured(40, 10, seed)) for seed in range(999)])
    assert abs(np.corrcoef(joined, rowvar=False)[0, 1]) < 0.15
    np.testing.assert_array_equal(users_measured(5, 9, 0), np.arange(5))
