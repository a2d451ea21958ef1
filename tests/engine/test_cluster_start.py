"""Ray as it starts: signals are answered as before, a start that takes too long ends in a sentence, and so does one of
far more workers than there are cores."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import ray

from fedsim.engine import cluster
from fedsim.engine.cluster import ClusterDidNotStart, join_or_start, leave
from fedsim.errors import InvalidInput

ROOT = Path(__file__).resolve().parents[2]

EMBEDDING = """
import signal, sys
from fedsim.engine.ray_grid import RayGrid

class Asked(Exception): pass

def answer(number, frame):
    if {raises}:
        raise Asked
    print("noted", flush=True)

signal.signal(signal.SIGTERM, answer)
print("starting", flush=True)
try:
    with RayGrid("mock_clients:app", workers=1) as grid:
        print("started", grid.get_node_ids(), flush=True)
        sys.stdin.readline()
except Asked:
    print("asked", flush=True)
assert signal.getsignal(signal.SIGTERM) is answer
"""


class Asked(Exception):
    """Our own answer to SIGTERM."""


@pytest.fixture
def answered() -> Iterator[None]:
    def answer(number: int, frame: FrameType | None) -> None:
        raise Asked

    before = signal.signal(signal.SIGTERM, answer)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Starts a Ray that does as it is told, and returns what it went through."""
    told: list[str] = []

    def made(init: Callable[[], None], workers: int = 1, **arguments: float) -> list[str]:
        def rays(**_: object) -> None:
            init()
            told.append("initialised")

        monkeypatch.setattr(ray, "init", rays)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "shutdown", lambda: told.append("shut down"))
        given = {"cpus_per_worker": 1.0, "start_seconds": 10.0} | arguments
        join_or_start(None, workers=workers, object_store_bytes=None, log_to_driver=False, **given)
        return told

    made.told = told  # type: ignore[attr-defined]
    yield made
    if cluster._connections:
        leave()


def test_sigterm_after_ray_has_started(answered: None, start: Callable[..., list[str]]) -> None:
    start(lambda: None)
    with pytest.raises(Asked):
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_while_ray_starts_ends_what_had_begun(answered: None, start: Callable[..., list[str]]) -> None:
    begun = threading.Event()

    def slowly() -> None:
        begun.set()
        time.sleep(0.3)

    def ask() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    with pytest.raises(Asked):
        start(slowly)
    assert start.told == ["initialised", "shut down"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("moment", ["starting\n", "started [1]\n"])
def test_a_program_that_answers_sigterm_itself_goes_its_own_way(raises: bool, moment: str) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", EMBEDDING.format(raises=raises)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    said = [program.stdout.readline()]
    while said[-1] != moment:
        said.append(program.stdout.readline())
        assert said[-1]
    time.sleep(0.5)
    program.send_signal(signal.SIGTERM)
    time.sleep(0.5)  # a handler runs before the line that it waits for
    rest, _ = program.communicate("\n", timeout=200)
    after = ["asked\n"] if raises else ["noted\n"]
    if moment == "starting\n" and not raises:
        after.append("started [1]\n")
    assert "".join(said) + rest == "".join([*said, *after])
    assert program.returncode == 0


def test_a_start_that_takes_too_long_is_a_sentence(start: Callable[..., list[str]]) -> None:
    never = threading.Event()
    with pytest.raises(ClusterDidNotStart, match=r"Ray did not start in 0\.2 s\..*--engine\.start-seconds"):
        start(never.wait, start_seconds=0.2)
    never.set()


@pytest.mark.parametrize("deaths", [0, 1, 2, 3, 9])
def test_a_head_whose_process_for_us_died_is_asked_again(start: Callable[..., list[str]], deaths: int) -> None:
    left = [ConnectionError("Starting Ray client server failed. See ray_client_server_23000.err")] * deaths

    def rays() -> None:
        if left:
            raise left.pop()

    if deaths < cluster.CLIENT_ATTEMPTS:
        assert start(rays) == ["initialised"]
    else:
        with pytest.raises(ClusterDidNotStart, match=r"could not start a process.* in 3 attempts.*23000\.err"):
            start(rays)
        assert len(left) == deaths - cluster.CLIENT_ATTEMPTS
        assert start.told == ["shut down"]  # type: ignore[attr-defined]


def test_any_other_failure_to_join_is_not_tried_again(start: Callable[..., list[str]]) -> None:
    tried: list[int] = []

    def rays() -> None:
        tried.append(1)
        raise ConnectionError("refused")

    with pytest.raises(InvalidInput, match="could not join"):
        start(rays)
    assert len(tried) == 1


def test_what_goes_wrong_in_ray_is_raised_here(start: Callable[..., list[str]]) -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match=r"^no$"):
        start(fail)
    assert start.told == ["shut down"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("cores", "workers", "each", "most"), [(2, 50, 1, 8), (2, 9, 1, 8), (2, 5, 2, 4), (1, 2, 8, 1)]
)
def test_far_more_workers_than_cores_are_refused(
    cores: int, workers: int, each: int, most: int, start: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "cores_here", lambda: cores)
    with pytest.raises(InvalidInput, match=rf"engine.workers is {workers}; it must be at most {most} .*{cores}"):
        start(lambda: None, workers=workers, cpus_per_worker=each)
    assert not start.told  # type: ignore[attr-defined]
    start(lambda: None, workers=most, cpus_per_worker=each)


def test_workers_that_share_a_core_may_be_many(
    start: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "cores_here", lambda: 2)
    start(lambda: None, workers=64, cpus_per_worker=0.1)
