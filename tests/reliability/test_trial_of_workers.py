"""A worker that cannot compute is named before anything is charged, and the run does without it or is refused."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from full_disk import full_disk
from small_runs import trained

from clients.worker import Worker
from experiments.face.outcomes import FineTuned
from fedsim.config import EngineConfig, RunConfig
from fedsim.errors import Failure, InvalidInput
from server.precautions.trial import TrialFailed, _gradients


@pytest.mark.parametrize("broken", [1, 2])
def test_who_cannot_compute_is_named(
    small_run: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: int,
) -> None:
    config = small_run(tmp_path / "run", engine=EngineConfig(kind="local", workers=3))
    numbers = itertools.count(1)  # workers of one process may compute at the same time

    def fails(self: Worker, max_tokens: int) -> int:
        number = next(numbers)
        if number <= broken:
            raise RuntimeError(f"no kernel image {number}.")
        return 1

    monkeypatch.setattr(Worker, "work", fails)
    assert trained(config)["rounds"] == 10
    said = [record.getMessage() for record in caplog.records if "cannot compute" in record.getMessage()]
    assert len(said) == broken
    for number in range(1, broken + 1):
        expected = f"no kernel image {number}. The run goes on with the other {3 - broken}"
        assert sum(expected in words for words in said) == 1
    assert len({words.split(",")[0] for words in said}) == broken  # each by its own number


def test_workers_that_do_not_answer_are_no_workers() -> None:
    grid = SimpleNamespace(send_and_receive=lambda messages: [])
    roster: Any = SimpleNamespace(grid=grid, workers=lambda: [7, 8])
    with pytest.raises(TrialFailed, match="it did not answer"):
        _gradients(roster, 16)


def test_a_report_that_the_disk_refuses_is_a_sentence(small_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    """At each of its writes."""
    trained(small_run(tmp_path / "run"))
    told = 0
    for first in itertools.count():
        with full_disk(tmp_path / "run", first) as disk:
            try:
                FineTuned(tmp_path / "run").report()
            except (Failure, InvalidInput) as refused:
                assert "No space left" in str(refused)  # noqa: PT017
                told += "nothing of it is lost: make room" in str(refused)
        if not disk.refused:
            break
    assert told
    assert FineTuned(tmp_path / "run").report().is_file()
