"""A disk that is full, at every write of a run, one after the other: neither ledger nor weights are lost."""

import dataclasses
import errno
import functools
import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crashes import charges, weights
from full_disk import full_disk

from clients.answers import app_of
from clients.worker import Computing, Worker
from fedsim.config import CheckpointConfig, EvaluationConfig, PlanConfig, RunConfig
from fedsim.engine.local import LocalGrid
from fedsim.errors import Failure, InvalidInput
from fedsim.privacy.earlier import Earlier, own_event
from fedsim.privacy.events import Adjacency
from fedsim.privacy.ledger import read_entries
from fedsim.resources import Resources, open_resources
from server import app, budget, checkpoint
from server.checkpoint import Checkpoint, CheckpointWriter, NotKept, write
from server.precautions import delivery, patience
from server.precautions.delivery import Undelivered
from server.results.run_folder import RunFolder
from server.training import NothingTrained, Training

ROUNDS = 2
PLAN = PlanConfig(
    rounds=ROUNDS,
    gradients_per_round=16,
    delta=1e-3,
    noise_multiplier=1.0,
    epsilon=1000.0,
    clip_norm=0.5,
    sampling="none",
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two attempts without a pause, and another disk."""
    monkeypatch.setattr(patience, "PAUSES", (0.0,))
    place = tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    return place


@pytest.fixture
def run(small_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """run(folder, **changes): trains, with one model, store and worker for all runs of a test."""
    measured = EvaluationConfig(every=1, max_rows=4, test_rows=4)
    common: dict[str, Any] = {"plan": PLAN, "checkpoint": CheckpointConfig(rounds=1), "evaluation": measured}
    here, there = (open_resources(small_run("", **common)) for _ in range(2))
    as_loaded = here.loaded.layout.flatten(here.loaded.model).clone()
    worker = Worker(
        there.loaded.model, there.loaded.objective, there.store, Computing.of(small_run(""), 16), inputs=there.inputs
    )

    def opened(config: RunConfig) -> Resources:
        here.loaded.layout.load(here.loaded.model, as_loaded)
        return here

    monkeypatch.setattr(app, "open_resources", opened)
    monkeypatch.setattr(budget, "epsilon_bounds", functools.cache(budget.epsilon_bounds))

    def trained(folder: Path, **changes: Any) -> dict[str, Any]:
        config = small_run(folder, **(common | changes))
        return app.train(LocalGrid(app_of(lambda _: worker)), config)

    return trained


def charged(folder: Path) -> list[int]:
    """The rounds that a run was charged for; none where it has no ledger yet."""
    ledger = folder / "ledger.jsonl"
    return charges(ledger) if ledger.exists() else []


def go_on(run: Callable[..., dict[str, Any]], folder: Path) -> dict[str, Any]:
    """As the sentence says that ended a run: --resume, or the same command again."""
    return run(folder, resume=str(folder) if (folder / "config.json").exists() else None)


@pytest.mark.parametrize("every", [1, 3])
def test_no_write_that_the_disk_refuses_costs_ledger_or_weights(
    run: Callable[..., dict[str, Any]], tmp_path: Path, every: int
) -> None:
    """From each write on for good, until the run is given up; and every third one once."""
    run(tmp_path / "whole")
    trained = weights(tmp_path / "whole")
    left = {path.name for path in (tmp_path / "whole").iterdir()}
    outcomes: Counter[str] = Counter()
    for first in itertools.count(step=every):
        folder = tmp_path / f"run-{first}"
        failure: Failure | InvalidInput | None = None
        with full_disk(folder, first, 10**9 if every == 1 else first) as disk:
            try:
                run(folder)
            except (Failure, InvalidInput) as error:  # whatever it is, it is told in a sentence
                failure = error
        if not disk.refused:
            assert failure is None
            break
        outcomes[type(failure).__name__] += 1
        if isinstance(failure, Undelivered):
            assert weights(Path(failure.elsewhere)) == trained
            for part in (".", "model"):  # goes on from there, and what was spent with it
                gone = Earlier.of_model(f"{failure.elsewhere}/{part}", adjacency=Adjacency.ADD_OR_REMOVE_ONE_USER)
                assert gone.all_events == own_event(read_entries(folder / "ledger.jsonl"))
        before = charged(folder)
        if failure is not None:
            assert go_on(run, folder)["rounds"] == ROUNDS
        # The ledger only grows, and ε is that of all its charges.
        after = charged(folder)
        assert after[: len(before)] == before
        if isinstance(failure, Undelivered):  # all was trained, and the state is in the other folder
            assert after == before
        assert set(after) == set(range(ROUNDS))
        again = len(after) - ROUNDS
        assert 0 <= again <= 2  # the rounds of one interval, and the one that ran while its checkpoint was written
        statement = json.loads((folder / "privacy.json").read_text())
        assert statement["steps"] == ROUNDS + again
        # The weights are those of the run that nothing befell, in the folder, and nothing secret is left.
        assert weights(folder) == trained
        assert [line["round"] for line in RunFolder(folder).read_metrics()] == list(range(ROUNDS + 1))
        assert {path.name for path in folder.iterdir()} <= left
        assert left - {path.name for path in folder.iterdir()} <= {"paths.json"}  # which a run can do without
        assert "data" not in RunFolder(folder).read_config()["identity"]
        assert not list(tmp_path.glob("elsewhere/**/checkpoints"))
    assert first > 80
    assert outcomes["Refused"] > 3
    assert outcomes["Undelivered" if every == 1 else "NoneType"] > 15


def test_where_no_other_folder_takes_the_model_it_is_trained_again_from_the_last_checkpoint(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole")
    with full_disk(tmp_path / "whole-again", 10**9) as counted:
        run(tmp_path / "whole-again")
    for name in ("TMPDIR", "HOME"):
        monkeypatch.setenv(name, "/proc")
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    folder = tmp_path / "run"
    with full_disk(folder, counted.writes - 47), pytest.raises(Undelivered, match="No other folder") as raised:
        run(folder)
    assert raised.value.round == ROUNDS - 1
    before = charged(folder)
    go_on(run, folder)
    assert charged(folder) == [*before, ROUNDS - 1]
    assert weights(folder) == weights(tmp_path / "whole")


@pytest.mark.parametrize("first", [OSError(errno.ENOSPC, "full"), ValueError("of something else")])
@pytest.mark.parametrize("broken", ["state", "take_away"])
def test_what_goes_wrong_elsewhere_hides_nothing(tmp_path: Path, first: Exception, broken: str) -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("another thing that is no disk's")

    def refused() -> None:
        raise first

    nothing: Callable[..., Any] = lambda *_: None  # noqa: E731
    state, take_away = (fails if broken == name else nothing for name in ("state", "take_away"))
    with pytest.raises(Undelivered if isinstance(first, OSError) else ValueError) as raised:
        delivery.deliver(RunFolder(tmp_path / "run"), {"the model": refused}, state, take_away)
    assert raised.value is first or raised.value.__cause__ is first
    assert not [*tmp_path.rglob("checkpoints"), *(tmp_path / "elsewhere").iterdir()]


@pytest.mark.parametrize("good", [0, 1, 3])
def test_nothing_more_is_charged_once_checkpoints_fail(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    """There is room for a line of the ledger, and none for a checkpoint."""
    written: list[int] = []

    def refusing(folder: Path, state: Checkpoint) -> Path:
        if len(written) >= good:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(state.round)
        return write(folder, state)

    plan = dataclasses.replace(PLAN, rounds=12)
    every = {"plan": plan, "checkpoint": CheckpointConfig(rounds=3)}
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write", refusing)
        with pytest.raises(NotKept, match="--resume") as raised:
            run(tmp_path / "run", **every)
    before = charged(tmp_path / "run")
    kept = written[-1] if written else 0
    assert len(before) - kept <= (4 if good else 0)  # an interval, and the round that ran while it was written
    assert raised.value.good == (kept if good else None)
    if not good:
        assert "Nothing is charged" in str(raised.value)
    run(tmp_path / "run", resume=str(tmp_path / "run"), **every)
    assert charged(tmp_path / "run") == before + list(range(kept, 12))


def test_a_run_that_trains_nothing_is_no_success(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    tight = {"plan": dataclasses.replace(PLAN, epsilon=0.01)}
    with pytest.raises(NothingTrained, match=r"Raise --plan\.epsilon"):
        run(tmp_path / "new", **tight)
    assert charged(tmp_path / "new") == []
    # All was charged, and no state kept.
    run(tmp_path / "whole")
    limit = json.loads((tmp_path / "whole/privacy.json").read_text())["epsilon"]["upper"]
    exact = {"plan": dataclasses.replace(PLAN, epsilon=limit)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CheckpointWriter, "_write", lambda *_: None)
        patched.setattr(Training, "_keep", lambda *_, finished=False: interrupted() if finished else None)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", **exact)
    before = charged(tmp_path / "run")
    assert len(before) == ROUNDS
    with pytest.raises(NothingTrained, match=f"no state is kept of what {ROUNDS} charges were spent on"):
        run(tmp_path / "run", resume=str(tmp_path / "run"), **exact)
    assert charged(tmp_path / "run") == before
    assert not (tmp_path / "run/model").exists()


def interrupted() -> None:
    raise KeyboardInterrupt


def test_a_finished_run_whose_model_is_gone_is_no_success(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run(tmp_path / "run")
    (tmp_path / "run/model").rename(tmp_path / "moved")
    with pytest.raises(Failure, match="its model is no longer in"):
        run(tmp_path / "run", resume=str(tmp_path / "run"))


def test_a_state_in_a_folder_that_others_can_write_to_is_not_taken(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    place = next(delivery._places(folder))
    (place / "checkpoints").mkdir(parents=True)
    write(place / "checkpoints", Checkpoint(round=7, arrays={}))
    place.chmod(0o700)
    assert (delivery.newest(folder) or Checkpoint(round=0, arrays={})).round == 7
    place.chmod(0o770)
    assert delivery.newest(folder) is None
    place.rename(tmp_path / "theirs")
    place.symlink_to(tmp_path / "theirs")
    assert delivery.newest(folder) is None
