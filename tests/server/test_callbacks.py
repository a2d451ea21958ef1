"""Callbacks: told of every round once, and unable to end a run."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from mock_training import training, uls_plan

from fedsim.errors import InvalidInput
from fedsim.privacy.ledger import read_entries
from server.callbacks import BegunRun, Callback, Callbacks
from server.results.run_folder import RunFolder


class Heard(Callback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def on_begin(self, run: BegunRun) -> None:
        self.told.append(("begin", run))

    def on_record(self, record: dict[str, Any]) -> None:
        self.told.append(("record", record))

    def on_end(self, summary: dict[str, Any]) -> None:
        self.told.append(("end", summary))

    def on_stop(self, reason: str) -> None:
        self.told.append(("stop", reason))

    def of(self, kind: str) -> list[Any]:
        return [what for told, what in self.told if told == kind]


class Failing(Heard):
    """Raises where it is told to."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__()
        self.where, self.error = where, error

    def _raise(self, where: str) -> None:
        if where == self.where:
            raise self.error

    def on_begin(self, run: BegunRun) -> None:
        super().on_begin(run)
        self._raise("on_begin")

    def on_record(self, record: dict[str, Any]) -> None:
        super().on_record(record)
        self._raise("on_record")

    def on_end(self, summary: dict[str, Any]) -> None:
        super().on_end(summary)
        self._raise("on_end")


def told_run(folder: Path, *callbacks: Callback) -> None:
    """A run of mock clients whose rounds callbacks are told of, as `server.app.train` tells them."""
    run = training(folder, uls_plan(steps=5), evaluate_every=2)
    called = Callbacks(callbacks)
    run.job = dataclasses.replace(run.job, callbacks=called)
    called.begin(BegunRun(folder=str(folder)))
    with called.told_of_stops():
        run.run()
    called.end({"rounds": 5})


def test_records_are_the_lines_of_metrics_one_a_round(tmp_path: Path) -> None:
    heard = Heard()
    told_run(tmp_path, heard)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert heard.of("record") == lines
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [kind for kind, _ in heard.told] == ["begin", *["record"] * 6, "end"]
    always = {"round", "epsilon", "gradient_evaluations", "learning_rate", "clip_norm", "not_private"}
    for line in lines:
        measured = {"loss", "perplexity", "accuracy", "weights"} if line["round"] in (0, 2, 4, 5) else set()
        released = {"released_norm", "noise_norm"} if line["round"] else set()
        assert set(line) == always | measured | released
    spent = [line["epsilon"] for line in lines]
    assert spent == sorted(spent)
    assert spent[0] == 0 < spent[1]


def test_what_a_callback_does_to_a_record_nobody_else_sees(tmp_path: Path) -> None:
    class Spoils(Callback):
        def on_record(self, record: dict[str, Any]) -> None:
            record["not_private"].clear()
            record.clear()

    heard = Heard()
    told_run(tmp_path, Spoils(), heard)
    assert all(record["not_private"]["phases"] for record in heard.of("record"))


@pytest.mark.parametrize("where", ["on_begin", "on_record", "on_end"])
def test_a_failing_callback_is_named_and_left_alone_and_the_run_goes_on(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    failing, heard = Failing(where, OSError("the tracker is away")), Heard()
    with caplog.at_level(logging.WARNING):
        told_run(tmp_path, failing, heard)
    assert [kind for kind, _ in heard.told] == ["begin", *["record"] * 6, "end"]
    heard_of = {"on_begin": 1, "on_record": 2, "on_end": 8}
    assert len(failing.told) == heard_of[where]
    (said,) = [record.getMessage() for record in caplog.records if "callback" in record.getMessage()]
    assert f"Failing failed in {where}" in said
    assert "OSError: the tracker is away" in said
    assert len(read_entries(tmp_path / "ledger.jsonl")) == 5


def test_a_callback_may_refuse_a_run_before_anything_is_charged_and_only_then(tmp_path: Path) -> None:
    refusal = InvalidInput("trackers", "x", "another")
    heard = Heard()
    with pytest.raises(InvalidInput):
        told_run(tmp_path / "a", heard, Failing("on_begin", refusal))
    assert not read_entries(tmp_path / "a/ledger.jsonl")
    told_run(tmp_path / "b", Failing("on_record", refusal))
    assert len(read_entries(tmp_path / "b/ledger.jsonl")) == 5


def test_who_interrupts_a_callback_interrupts_the_run(tmp_path: Path) -> None:
    heard = Heard()
    with pytest.raises(KeyboardInterrupt):
        told_run(tmp_path, heard, Failing("on_record", KeyboardInterrupt()))
    assert heard.of("stop") == ["KeyboardInterrupt"]
    assert not heard.of("end")


def test_what_is_no_callback_is_refused() -> None:
    for wrong in (print, Heard, object()):
        with pytest.raises(InvalidInput, match=r"fedsim\.Callback"):
            Callbacks([wrong])  # type: ignore[list-item]


def test_the_last_round_is_told_once_more_where_an_interrupted_run_cannot_go_on(tmp_path: Path) -> None:
    """It was to go on after a round that was not measured; charges of lost rounds then used up the budget."""
    run = training(tmp_path, uls_plan(steps=5), evaluate_every=2)
    states = []

    def kept(*arguments: Any, **named: Any) -> None:
        states.append(run.state())

    run._keep = kept  # type: ignore[method-assign]
    run.run()
    run.budget.ledger.close()  # type: ignore[attr-defined]
    again = training(tmp_path, uls_plan(steps=5), evaluate_every=2)
    again.load_state(states[2])
    again.job.round.affords = lambda number: False  # type: ignore[method-assign]
    heard = Heard()
    called = Callbacks([heard])
    called.begin(BegunRun(folder=str(tmp_path)))
    again.job = dataclasses.replace(again.job, callbacks=called)
    again.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert heard.of("record") == lines[-1:]
    assert lines[-1]["loss"] == 2.0
    assert lines[-1]["not_private"]["units"] > 0
    assert lines[-1]["not_private"]["phases"]["rounds"] == 1
    assert lines[-1]["not_private"]["phases"]["seconds"]["evaluation"] > 0


@pytest.mark.parametrize("waiting", [False, True])
def test_only_the_line_of_the_round_is_taken_back(tmp_path: Path, waiting: bool) -> None:
    folder = RunFolder(tmp_path)
    for round in range(3):
        folder.append_metrics({"round": round, "not_private": {"words": "ε"}})
    if waiting:
        folder.waiting.append(json.dumps({"round": 3}) + "\n")
    last = 3 if waiting else 2
    assert folder.take_back(last + 1) == {}
    assert folder.take_back(last)["round"] == last
    folder.write_metrics()
    assert [line["round"] for line in folder.read_metrics()] == list(range(last))
    assert RunFolder(tmp_path / "none").take_back(0) == {}
