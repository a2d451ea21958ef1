"""Private selections against untuned runs: what is run, what is kept of each, and what the table says."""

import json
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from benchmarks import tuned
from benchmarks.regime.rates import MODEL, RATES
from benchmarks.regime.studies import FILES
from benchmarks.tuned import DEFAULT, GROUP_SIZES, LARGER, PUBLIC, SELECTED, UNTUNED, Outcome, Tuned, comparison, read
from experiments.account.command import Account
from experiments.evaluate import Evaluate
from experiments.run import main
from experiments.sweep.command import Sweep
from experiments.train import Train
from fedsim.errors import InvalidInput


def outcome(kind: str, loss: float, setting: tuple[int, float] = DEFAULT, gradients: float = 6400.0) -> Outcome:
    return Outcome(
        corpus="shakespeare",
        kind=kind,
        arguments=[],
        gradients=gradients,
        epsilon=7.9996,
        loss=loss,
        group_size=setting[0],
        rate=setting[1],
        date="2026-11-28",
        versions={},
    )


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs no command: what the command line made of each."""
    made: list[Any] = []
    one_at_a_time = Lock()
    for command in (Sweep, Train, Evaluate, Account):
        monkeypatch.setattr(command, "run", lambda self: made.append(self) or 0)
    for needed in (MODEL, FILES["shakespeare"]):
        (tmp_path / needed).mkdir(parents=True)

    def call(arguments: list[str]) -> str:
        with one_at_a_time:  # the command line is read by a package that threads must not share
            assert main(arguments) == 0
        if arguments[0] in ("train", "sweep"):
            folder, selection = Path(arguments[-1]), {}
            if arguments[0] == "sweep":
                folder, selection = folder / "selected", {"selection": {"selected": {"learning_rate": 0.003}}}
            (folder / "model").mkdir(parents=True)
            statement = {"epsilon": {"upper": 7.99}, "contribution_bound": {"group_size": 4}, **selection}
            (folder / "privacy.json").write_text(json.dumps(statement))
            (folder / "config.json").write_text(json.dumps({"config": {"optimizer.learning-rate": 0.001}}))
        return json.dumps({"loss": 3.5})

    monkeypatch.setattr(tuned, "_call", call)
    return made


def test_every_command_is_one_that_the_command_line_takes_at_the_same_total(tmp_path: Path, called: list[Any]) -> None:
    benchmark = Tuned(corpus="shakespeare", corpora=tmp_path, output=tmp_path / "out", selections=2)
    benchmark.run()
    kept = list(read(tmp_path / "out"))
    assert [one.kind for one in kept].count(SELECTED) == 2
    assert len(kept) == 6 + 2 * 2 + 2 + 2
    runs = [one for one in called if isinstance(one, Train | Sweep)]
    assert len(runs) == len(kept)
    assert all((run.plan.epsilon, run.plan.delta, run.plan.rounds) == (8, 1e-5, 25) for run in runs)
    assert {run.sampling_seed for run in runs} == {None}
    assert sorted({one.gradients for one in kept}) == [3200, 12800]
    assert {one.gradients for one in kept if one.kind in (SELECTED, LARGER)} == {12800}
    singles = {(run.plan.group_size, run.optimizer.learning_rate) for run in runs if isinstance(run, Train)}
    assert singles == {(group_size, rate) for group_size in GROUP_SIZES for rate in RATES}
    (grid,) = {(run.sweep.uls_group_sizes, run.sweep.learning_rates) for run in runs if isinstance(run, Sweep)}
    assert grid == (GROUP_SIZES, RATES)
    assert sum(isinstance(one, Account) for one in called) == len(kept)
    measured = [one for one in called if isinstance(one, Evaluate)]
    assert len({(one.split, one.max_rows, one.data) for one in measured}) == 1
    assert str(tmp_path) not in (tmp_path / "out" / "shakespeare.jsonl").read_text()
    called.clear()
    benchmark.run()
    assert not called, "what is there is not made again"
    replace(benchmark, untuned=2).run()
    assert len([one for one in called if isinstance(one, Train)]) == 6


def rows_of(outcomes: list[Outcome]) -> dict[str, list[str]]:
    lines = comparison(outcomes).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[1].partition(":")[0]: row[2:] for row in cells}


def test_the_table_says_by_how_much_the_selection_is_better_or_worse() -> None:
    outcomes = [outcome(SELECTED, 3.4, PUBLIC, 25600), outcome(SELECTED, 3.6, (4, 1e-3), 25600)]
    outcomes += [outcome(UNTUNED, loss) for loss in (3.44, 3.46, 3.45, 3.45)]
    outcomes += [outcome(UNTUNED, loss, (4, 1e-2)) for loss in (3.99, 4.01)]
    outcomes += [outcome(LARGER, 3.2, PUBLIC, 25600)]
    rows = rows_of(outcomes)
    assert rows["private selection"][:4] == ["2", "25,600", "8.000", "3.500"]
    assert float(rows["private selection"][4]) == pytest.approx(12.706 * 0.1, abs=1e-3)
    assert rows["one run, the defaults"][3] == "3.450"
    assert rows["one run, the defaults"][5].startswith("-0.050 ± ")
    assert rows["one run, a guess"][0] == "6"
    assert rows["one run, a guess"][3] == "3.725", "settings count alike, however many runs each has"
    assert rows["one run, a guess"][5].startswith("+0.225 ± ")
    assert rows["one run, all computation"][3:] == ["3.200", "–", "-0.300"]
    assert "one run, the rate of public users" not in rows


def test_a_table_of_what_there_is_so_far() -> None:
    assert rows_of([outcome(UNTUNED, 3.4)])["one run, the defaults"] == ["1", "6,400", "8.000", "3.400", "–", ""]
    assert comparison([]).count("\n") == 1


def test_what_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="shakespeare, ubuntu-irc or table"):
        Tuned(corpus="none").run()
    with pytest.raises(InvalidInput, match="model_stories260k"):
        Tuned(corpus="shakespeare", corpora=tmp_path).run()


def test_the_page_holds_what_is_kept() -> None:
    docs = Path(__file__).resolve().parents[1] / "docs"
    kept = list(read(docs / "reports" / "tuned"))
    assert {one.corpus for one in kept} == {"shakespeare", "ubuntu-irc"}
    assert all(one.epsilon <= 8 for one in kept)
    for corpus in ("shakespeare", "ubuntu-irc"):
        wanted = [arguments for _, arguments in Tuned(corpus=corpus)._wanted()]
        assert sorted(wanted) == sorted(one.arguments for one in kept if one.corpus == corpus)
    page = (docs / "selection.md").read_text(encoding="utf-8")
    assert comparison(kept) in page
    assert comparison([replace(kept[0], loss=kept[0].loss + 0.1), *kept[1:]]) not in page
