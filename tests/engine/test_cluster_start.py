"""What Ray does as it starts and the house answers: SIGTERM, which would end the program without a word, and names of
folders that it cannot encode."""

import os
import signal
from collections.abc import Iterator
from types import FrameType

import pytest
import ray

from fedsim.engine import cluster
from fedsim.errors import InvalidInput


class Asked(Exception):
    """Our own answer to SIGTERM."""


@pytest.fixture
def answered() -> Iterator[None]:
    def answer(number: int, frame: FrameType | None) -> None:
        raise Asked

    before = signal.signal(signal.SIGTERM, answer)
    yield
    signal.signal(signal.SIGTERM, before)


def _start(monkeypatch: pytest.MonkeyPatch, meanwhile: bool) -> None:
    def rays(number: int, frame: FrameType | None) -> None:
        raise SystemExit(number)

    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, rays)
        if meanwhile:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    cluster.join_or_start(None, cpus=1, object_store_bytes=None, log_to_driver=False)


def test_sigterm_after_ray_has_started(answered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    _start(monkeypatch, meanwhile=False)
    with pytest.raises(Asked):
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_while_ray_starts(answered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Asked):
        _start(monkeypatch, meanwhile=True)


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_that_ray_cannot_name_is_a_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, "/tmp/grün")
    with pytest.raises(InvalidInput, match=f"^{name} is '/tmp/grün'; it must be a folder whose name has ASCII"):
        _start(monkeypatch, meanwhile=False)
