"""Parts made by other processes are the parts that this one would have made."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from readable_stores import LetterTokenizer, write_jsonl

from fedsim.data import group, part_pool
from fedsim.data.config import DataConfig
from fedsim.data.ingest import build_store
from fedsim.data.part_pool import PartPool
from fedsim.errors import Failure, InvalidInput


class Elsewhere(LetterTokenizer):
    """Behaves as it should in the process of the tests alone."""

    def __init__(self, act: str):
        self.act = act
        self.home = os.getpid()
        self.texts = 0

    def __call__(self, texts: list[str]) -> list[list[int]]:
        probe = len(texts) <= 3
        self.texts += 0 if probe else len(texts)
        if os.getpid() != self.home:
            if self.act == "differ":
                return [[1, 2, 3, 4]] * len(texts)
            if self.act == "die" and not probe:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.act == "overflow" and not probe:
                return [[999] * 4] * len(texts)
            if self.act == "print":
                print("a tokenizer that talks")
        return super().__call__(texts)


@pytest.fixture
def config(tmp_path, monkeypatch) -> DataConfig:
    """Some 20 parts."""
    monkeypatch.setattr("fedsim.data.json_files.RECORDS_AT_ONCE", 256)
    monkeypatch.setattr("fedsim.data.spool.PART_RECORDS", 256)
    records = [{"user_id": f"u{n % 97}", "text": f"text number {n % 1000}"} for n in range(5000)]
    records[::700] = [{"user_id": "u1"}] * len(records[::700])
    path = write_jsonl(tmp_path / "d.jsonl", records)
    return DataConfig(source="files", path=str(path), validation_fraction=0.2, test_fraction=0.2)


@pytest.fixture
def asked(monkeypatch) -> list[bytes]:
    """What other processes were asked."""
    found: list[bytes] = []
    ask = part_pool._Process.ask

    def counted(self, pickled: bytes):
        found.append(pickled)
        return ask(self, pickled)

    monkeypatch.setattr(part_pool._Process, "ask", counted)
    return found


def on(monkeypatch, cores: int) -> None:
    monkeypatch.setattr(part_pool, "cores", lambda: cores)
    monkeypatch.setattr(group, "cores", lambda: cores)


def test_a_store_is_the_same_on_any_number_of_cores(tmp_path, config, tokenizer, monkeypatch, asked) -> None:
    stores = []
    for cores in (1, 3):
        on(monkeypatch, cores)
        stores.append(build_store(config, tokenizer, tmp_path / f"on{cores}"))
        assert (len(asked) > 10) == (cores > 1)
    one, three = stores
    assert one.fingerprint == three.fingerprint
    told = [{name: value for name, value in store.manifest.items() if name != "recipe"} for store in stores]
    assert told[0] == told[1]
    assert one.manifest["bad_rows"]["missing text"]["count"] == 8


@pytest.mark.parametrize("act", ["differ", "print", "stay"])
def test_a_tokenizer_that_is_another_elsewhere_encodes_here(tmp_path, config, tokenizer, monkeypatch, act) -> None:
    on(monkeypatch, 2)
    plain = build_store(config, tokenizer, tmp_path / "plain")
    own = Elsewhere(act)
    if act == "stay":
        own.unsendable = lambda: None
    found = build_store(config, own, tmp_path / "own")
    assert found.fingerprint == plain.fingerprint
    assert (own.texts > 1000) == (act != "print")


def test_what_is_wrong_elsewhere_is_told_here(tmp_path, config, monkeypatch) -> None:
    on(monkeypatch, 2)
    with pytest.raises(InvalidInput, match="one whose ids are from 0 to 255"):
        build_store(config, Elsewhere("overflow"), tmp_path / "store")


def test_a_process_that_dies_ends_in_a_sentence_and_the_build_goes_on(
    tmp_path, config, tokenizer, monkeypatch
) -> None:
    on(monkeypatch, 2)
    with pytest.raises(Failure, match="goes on where it stopped"):
        build_store(config, Elsewhere("die"), tmp_path / "store")
    found = build_store(config, tokenizer, tmp_path / "store")
    assert found.fingerprint == build_store(config, tokenizer, tmp_path / "whole").fingerprint


def test_no_process_outlives_the_pool(tmp_path, config, tokenizer, monkeypatch) -> None:
    on(monkeypatch, 2)
    started = []
    begin = part_pool._Process.__init__

    def noted(self, writer: bytes) -> None:
        begin(self, writer)
        started.append(self._process)

    monkeypatch.setattr(part_pool._Process, "__init__", noted)
    build_store(config, tokenizer, tmp_path / "store")
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


@pytest.mark.parametrize(("memory", "processes"), [("200MB", 1), ("1GB", 4), ("100GB", 64)])
def test_processes_are_as_many_as_there_is_memory_for(tmp_path, monkeypatch, memory, processes) -> None:
    on(monkeypatch, 64)

    class Writer:
        config = DataConfig(memory_limit=memory)

    assert PartPool(Writer())._processes == processes


PROGRAM = """
import os, pickle, signal, threading, time
from fedsim.data.part_pool import _Process

class Slow:
    def __reduce__(self):
        return (time.sleep, (60,))

process = _Process(pickle.dumps(Slow()))
threading.Thread(target=process.ask, args=(pickle.dumps(Slow()),), daemon=True).start()
time.sleep(1)
print(process._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Elsewhere a process notices when it has finished its part.")
def test_a_process_ends_with_the_one_that_asked() -> None:
    """In the middle of a part: another build may be where it would be written."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    ends = time.monotonic() + 20
    while _runs(int(done.stdout)) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not _runs(int(done.stdout))


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("cores", "memory_limit", "threads"), [(7, "4GB", 7), (1, "4GB", 1), (64, "1GB", 8)])
def test_the_sort_takes_all_cores_that_its_memory_has_room_for(
    config, tmp_path, monkeypatch, cores: int, memory_limit: str, threads: int
) -> None:
    taken = []
    enter = group.GroupedParts.__enter__

    def noted(parts: group.GroupedParts) -> group.GroupedParts:
        ((found,),) = parts.connection.execute("SELECT current_setting('threads')").fetchall()
        taken.append(found)
        return enter(parts)

    monkeypatch.setattr(group, "cores", lambda: cores)
    monkeypatch.setattr(group.GroupedParts, "__enter__", noted)
    build_store(dataclasses.replace(config, memory_limit=memory_limit), LetterTokenizer(), tmp_path / "store")
    assert taken == [threads]
