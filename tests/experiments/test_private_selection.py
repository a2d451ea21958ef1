"""`sweep --select private`: what it costs, what it releases, and that it goes on with what it drew."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from mock_selection import COMMON, SIZES, SMALL, SWEEP, Trained, select
from mock_sweep import FakeTraining, small_sweep

import experiments.selection.command as command
import experiments.selection.release as release
import experiments.sweep.run
from experiments.confirmation import confirm_folder
from experiments.run import main
from experiments.selection.budget import SelectionBudget, budget_of
from experiments.selection.options import SelectionConfig
from experiments.selection.runs import PRIVATE, at, require_selectable, settings_of
from experiments.sweep.command import Sweep
from experiments.sweep.points import CLAIM, Point
from fedsim.config import EvaluationConfig, PlanConfig, RunConfig
from fedsim.errors import Failure, InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.bounds import shown_above
from fedsim.privacy.earlier import Earlier
from fedsim.privacy.events import Adjacency, Gaussian
from fedsim.privacy.ledger import read_entries
from fedsim.privacy.selection import best_of
from fedsim.seeds import Seeds
from server.results.run_folder import write_json


def test_the_total_is_met_from_below_and_is_far_less_than_composition(budget: SelectionBudget) -> None:
    total = COMMON.plan.epsilon
    again = epsilon_bounds(budget.event, COMMON.plan.delta)
    assert 0.99 * total < again.upper == budget.epsilon.upper <= total
    assert budget.score_epsilon == budget.run_epsilon < total < budget.composed
    assert len(budget.event.events) < 4, "settings that release the same are one event"


def test_a_score_of_ones_own_choice_is_kept_and_refused_where_it_alone_is_too_much() -> None:
    options, settings = SelectionConfig(expected_runs=3.0), settings_of(SWEEP, COMMON)

    def with_score(epsilon: float, options: SelectionConfig = options) -> SelectionBudget:
        score = EvaluationConfig(private=True, private_epsilon=epsilon)
        return budget_of(settings, dataclasses.replace(COMMON, evaluation=score), SIZES, 500, options)

    assert with_score(1.0).score_epsilon == 1.0
    with pytest.raises(InvalidInput, match=r"evaluation\.private-epsilon"):
        with_score(7.9)
    few = SelectionConfig(expected_runs=1.5)
    large = with_score(5.6, few)  # more than two thirds of the total, and there is room
    assert large.score_epsilon == 5.6 <= large.run_epsilon
    assert large.epsilon.upper <= 8
    with pytest.raises(InvalidInput, match=r"within plan\.epsilon, 8") as refused:
        with_score(7.2, few)
    assert "Runs of at least as much" in str(refused.value)


def test_the_best_run_alone_is_released_and_nothing_of_the_others(
    trained: Trained, budget: SelectionBudget, tmp_path: Path
) -> None:
    trained.changes = {"run-0000": math.nan, "run-0001": -0.1, "run-0002": -0.3, "run-0003": -0.3}
    swept = select(tmp_path, budget)
    released = tmp_path / "selected"
    assert json.loads((released / "model" / "config.json").read_text())["of"] == "run-0002"
    (entry,) = read_entries(released / "ledger.jsonl")
    assert entry.event == budget.event
    statement = json.loads((released / "privacy.json").read_text())
    assert statement["epsilon"]["upper"] == budget.epsilon.upper
    assert statement["selection"]["private_change"] == -0.3
    assert "selection" in statement["in_words"]
    # No loss without noise, no other run, no number of runs.
    everything = "".join(path.read_text() for path in released.rglob("*") if path.is_file())
    assert "3.125" not in everything
    assert "2.0625" not in everything
    assert "run-0000" not in everything
    assert not list(tmp_path.rglob("run-*"))
    report = (tmp_path / "report.md").read_text() + swept.report.read_text()
    assert "The selection costs ε ≤" in report
    assert "by composition" in report
    Earlier.of_model(str(released / "model"), adjacency=Adjacency.ADD_OR_REMOVE_ONE_USER)  # its mark is the ledger's
    assert set(trained.seeds) == {(None, None)}, "seeds are the operating system's"


def test_a_second_method_confirms_the_release_and_refuses_a_forged_one(
    trained: Trained, budget: SelectionBudget, tmp_path: Path
) -> None:
    select(tmp_path, budget)
    released = tmp_path / "selected"
    assert confirm_folder(released, (), as_json=False) == 0
    statement = json.loads((released / "privacy.json").read_text())
    forged = f"{0.97 * budget.epsilon.upper:.4g}"
    statement["epsilon"]["upper"] = float(forged)
    statement["in_words"] = f"The model has ε = {forged}, δ = 0.0001: so it is."
    write_json(released / "privacy.json", statement)
    with pytest.raises(Failure, match="contradicted"):
        confirm_folder(released, (), as_json=False)


def test_an_interrupted_selection_goes_on_with_what_it_drew_and_finds_the_same_winner(
    trained: Trained, budget: SelectionBudget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.changes = {"run-0001": -0.2, "run-0003": -0.1}
    trained.interrupted = {"run-0002"}
    with pytest.raises(KeyboardInterrupt):
        select(tmp_path, budget)
    drawn = (tmp_path / PRIVATE / "drawn.json").read_text()
    assert not (tmp_path / "selected").exists()
    trained.interrupted = set()
    monkeypatch.setattr(command, "draw_runs", lambda *_: 9)
    select(tmp_path, budget)
    assert (tmp_path / PRIVATE / "drawn.json").read_text() == drawn
    assert len(trained.seeds) == 4, "finished runs are not run again"
    assert json.loads((tmp_path / "selected" / "model" / "config.json").read_text())["of"] == "run-0001"
    assert len(read_entries(tmp_path / PRIVATE / "ledger.jsonl")) == 1
    before = (tmp_path / "selected" / "privacy.json").read_text()
    select(tmp_path, budget)  # finished: only told again
    assert len(trained.seeds) == 4
    assert (tmp_path / "selected" / "privacy.json").read_text() == before
    other = dataclasses.replace(COMMON, plan=dataclasses.replace(COMMON.plan, rounds=4))
    with pytest.raises(InvalidInput, match="a new folder"):
        select(tmp_path, budget, other)


def test_a_run_that_failed_is_the_worst_and_is_not_run_again(
    trained: Trained, budget: SelectionBudget, tmp_path: Path
) -> None:
    trained.failing = {"run-0000", "run-0001", "run-0002", "run-0003"}
    with pytest.raises(Failure, match="no run of the selection finished"):
        select(tmp_path / "none", budget)
    trained.failing = set()
    with pytest.raises(Failure, match="no run of the selection finished"):
        select(tmp_path / "none", budget)
    trained.failing, trained.changes = {"run-0000"}, {"run-0003": 0.4}
    assert not select(tmp_path / "some", budget).failures, "how many failed is not for release"
    assert [path.name for path in (tmp_path / "some" / PRIVATE / "failures").iterdir()] == ["run-0000.txt"]
    assert json.loads((tmp_path / "some" / "selected" / "model" / "config.json").read_text())["of"] == "run-0003"


def test_nothing_is_released_where_a_run_was_charged_more_than_planned(
    trained: Trained, budget: SelectionBudget, tmp_path: Path
) -> None:
    trained.charged_twice = True
    with pytest.raises(Failure, match="charged for more"):
        select(tmp_path, budget)
    assert not (tmp_path / "selected").exists()


def test_given_seeds_give_each_run_its_own_and_are_refused_with_release() -> None:
    given = dataclasses.replace(COMMON, sampling_seed=1, noise_seed=2)
    setting = settings_of(SWEEP, given)[0]
    runs = [at(setting, number, 2.0, 2.0).config(given, Path()) for number in range(5)]
    assert len({run.noise_seed for run in runs}) == len({run.sampling_seed for run in runs}) == 5
    with pytest.raises(InvalidInput, match="noise-seed"):
        Sweep(select="private", release=True, noise_seed=3)
    assert Sweep(select="private", release=True).release
    with pytest.raises(InvalidInput, match="release"):
        Sweep(release=True)


@pytest.mark.parametrize(
    ("sweep", "common", "name"),
    [
        ({"repeat": "best"}, {}, "independently of all results"),
        ({"epsilons": (1.0, 2.0)}, {}, "the total of the release"),
        ({"seeds": 2}, {}, "expected-runs"),
        ({"keep_models": True}, {}, "deleted"),
        ({}, {"evaluation": EvaluationConfig(every=2)}, "scored once"),
        ({}, {"plan": PlanConfig(noise_multiplier=1.0)}, "noise-multiplier"),
        ({}, {"plan": PlanConfig(adjacency="replace-one-user")}, "adjacency"),
        ({}, {"trackers": ("tensorboard",)}, "trackers"),
    ],
)
def test_what_is_no_private_selection_is_refused_with_the_reason(
    sweep: dict[str, Any], common: dict[str, Any], name: str
) -> None:
    with pytest.raises(InvalidInput, match=name):
        require_selectable(dataclasses.replace(COMMON, **common), dataclasses.replace(SWEEP, **sweep))


def test_a_sweep_and_a_selection_do_not_share_a_folder(
    training: FakeTraining, trained: Trained, budget: SelectionBudget, tmp_path: Path
) -> None:
    select(tmp_path / "selection", budget)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / CLAIM).write_text("{}")
    before = (tmp_path / "selection" / "results.json").read_text()
    with pytest.raises(InvalidInput, match=f"a new folder.*{PRIVATE}"):
        small_sweep(tmp_path / "selection").swept()
    with pytest.raises(InvalidInput, match=f"a new folder.*{CLAIM}"):
        Sweep(select="private", sweep=SWEEP, engine=COMMON.engine, output=str(tmp_path / "sweep")).swept()
    assert (tmp_path / "selection" / "results.json").read_text() == before
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == [CLAIM]


def test_adaptive_search_is_refused_with_the_reason() -> None:
    with pytest.raises(InvalidInput, match="independently of all results"):
        Sweep(select="adaptive")
    with pytest.raises(InvalidInput, match="selection"):
        Sweep(selection=SelectionConfig(expected_runs=4.0))
    with pytest.raises(InvalidInput, match="expected_runs"):
        SelectionConfig(expected_runs=1.0)


def test_the_released_score_is_told_with_its_noise_and_as_optimistic(
    trained: Trained, budget: SelectionBudget, tmp_path: Path
) -> None:
    trained.changes = {"run-0001": -0.25}
    report = select(tmp_path, budget).report
    statement = json.loads((tmp_path / "selected" / "privacy.json").read_text())
    evaluation = at(settings_of(SWEEP, COMMON)[0], 0, budget.run_epsilon, budget.score_epsilon)
    planned = evaluation.config(COMMON, Path()).private_evaluation(500)
    assert planned is not None
    assert statement["selection"]["private_change_std"] == planned.standard_deviation
    told = (statement["in_words"], (tmp_path / "report.md").read_text(), report.read_text())
    for text in told:
        assert "changed by -0.2500 nats" in text
        assert f"standard deviation {planned.standard_deviation:.3g}" in text
        assert "clipped to ±2 nats" in text
        assert f"an ε of {shown_above(budget.score_epsilon)}" in text
        assert "optimistic" in text
    assert all("change of held-out loss" in text for text in told[1:])
    assert any("one model and its one score" in sentence for sentence in statement["not_covered"])
    assert not any("models of this run" in sentence for sentence in statement["not_covered"])


def test_the_released_files_do_not_tell_when_the_run_was_made(
    trained: Trained, budget: SelectionBudget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = release.write_release

    def written_later(run: Path, *others: Any) -> None:
        (run / "model" / "within").mkdir()
        (run / "model" / "within" / "more.json").write_text("{}")
        for path in (run / "model").rglob("*"):
            os.utime(path, (1.0, 1.0))
        write(run, *others)

    monkeypatch.setattr(release, "write_release", written_later)
    select(tmp_path, budget)
    assert (tmp_path / "selected" / "model" / "within" / "more.json").read_text() == "{}"
    assert min(path.stat().st_mtime for path in (tmp_path / "selected").rglob("*")) > 1.0


def first_fails(run_point: Any) -> Any:
    """The same, of which the first run fails."""

    def run(point: Point, *others: Any) -> None:
        if point.seed == 0:
            raise ValueError("loss is not finite")
        run_point(point, *others)

    return run


def test_a_selection_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "draw_runs", lambda *_: 2)
    grid = ["--sweep.algorithms", "uls", "--sweep.learning-rates", "1e-3", "1e-2", "--selection.expected-runs", "2"]
    drawn: list[Seeds] = []

    def noted(config: RunConfig, earlier: str = "") -> Seeds:
        drawn.append(draw(config, earlier))
        return drawn[-1]

    draw = Seeds.drawn
    monkeypatch.setattr(Seeds, "drawn", noted)
    monkeypatch.setattr(experiments.sweep.run, "run_point", first_fails(experiments.sweep.run.run_point))
    assert main(["sweep", "--select", "private", *SMALL, *grid, "--release", "--output", str(tmp_path / "s")]) == 0
    assert len(drawn) == 2, "training takes the seeds that were drawn with the run"
    said, told = capsys.readouterr()
    shown, before = told.index("run-0000"), " ".join(told.split()).index("is not private and must not be published")
    assert 0 < before < shown
    assert told.count("must not be published") == 1
    assert "run-0000 FAILED, which counts as the worst score" in told
    assert "run-0001 finished" in told
    assert "run-0" not in said
    assert "selection costs ε ≤" in said
    assert "by composition" in said
    assert main(["account", "--check", str(tmp_path / "s" / "selected")]) == 0
    card = (tmp_path / "s" / "selected" / "README.md").read_text()
    assert "The selection:" in card
    assert {path.name for path in (tmp_path / "s" / "selected").iterdir()} == {
        "model", "ledger.jsonl", "privacy.json", "README.md",
    }  # fmt: skip


def test_account_of_a_selection(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["account", "--sampling", "none", "--noise-multiplier", "2", "--steps", "1", "--json"]
    assert main([*plan, "--selection.expected-runs", "6"]) == 0
    selected = json.loads(capsys.readouterr().out)
    event = best_of(Gaussian(noise_multiplier=2.0), expected_runs=6.0)
    assert selected["epsilon"]["upper"] == epsilon_bounds(event, 1e-5).upper
    assert not selected["tight"]
    assert main([*plan[:3], "--target-epsilon", "4", "--steps", "1", "--selection.expected-runs", "6", "--json"]) == 0
    assert 3.99 < json.loads(capsys.readouterr().out)["epsilon"]["upper"] <= 4
    assert main([*plan, "--selection.eta", "0"]) == 2
    assert main([*plan, "--selection.expected-runs", "0.5"]) == 2
