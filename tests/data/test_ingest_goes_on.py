"""An ingest that is killed goes on where it was, in either pass, and ends in the same store."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from readable_stores import LetterTokenizer, write_jsonl

from fedsim.data.collect import STATE, Collection
from fedsim.data.config import DataConfig
from fedsim.data.ingest import build_store
from fedsim.data.part import PARTS
from fedsim.data.store import UserStore
from fedsim.errors import Failure, InvalidInput

RECORDS = 20_000
PROGRAM = """
import itertools, os, signal, sys
from types import SimpleNamespace
from fedsim.data import collect, group, spool
from fedsim.data.ingest import build_store
from readable_stores import LetterTokenizer
from test_ingest_goes_on import config_of

spool.PART_RECORDS, group.EXAMPLES_AT_ONCE, collect.SECONDS_BETWEEN_STATES = 4096, 500, 7.5
collect.time = SimpleNamespace(monotonic=itertools.count().__next__)  # states are set down after every eighth batch
path, output, stage, share = sys.argv[1:]

def progress(what, done, total):
    if what == stage and done >= float(share) * total:
        os.kill(os.getpid(), signal.SIGKILL)

build_store(config_of(path), LetterTokenizer(), output, progress=progress)
"""


def config_of(path) -> DataConfig:
    return DataConfig(source="files", path=str(path), validation_fraction=0.2, test_fraction=0.2, sequence_length=8)


def killed_at(path: Path, output: Path, stage: str, share: float) -> None:
    """Build in another process, which is killed without warning when it is so far."""
    command = [sys.executable, "-c", PROGRAM, str(path), str(output), stage, str(share)]
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, UserStore]:
    """The data, and the store of a build that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    records = [
        {"user_id": f"U{n % 700}" if n % 9 else f"u{n % 70}", "text": f"text {n % 3000}"} for n in range(RECORDS)
    ]
    path = write_jsonl(folder / "d.jsonl", records)
    return path, build_store(config_of(path), LetterTokenizer(), folder / "store")


@pytest.mark.parametrize(
    ("stage", "share"),
    [
        ("Reading and encoding", 0.5),
        ("Sorting by user", 1.0),
        ("Grouping by user", 0.3),
        ("Grouping by user", 0.9),
        ("Comparing users", 0.0),
        ("Comparing users", 1.0),
        ("Writing the store", 0.0),
    ],
)
def test_a_build_that_was_killed_goes_on(tmp_path, whole, monkeypatch, stage: str, share: float) -> None:
    path, expected = whole
    output = tmp_path / "store"
    killed_at(path, output, stage, share)
    partial = tmp_path / "store.partial"
    with pytest.raises(InvalidInput, match="interrupted"):
        UserStore.open(output)
    parts = {file.name: file.stat().st_mtime_ns for file in (partial / "parts").rglob(PARTS)}
    assert parts
    before = (partial / STATE).is_file()
    assert before == (stage not in ("Reading and encoding", "Sorting by user"))

    gathered = json.loads((partial / STATE).read_text())["examples"] if before else 0
    told: set[str] = set()
    added: list[int] = []
    add = Collection._add

    def counted(self, batch) -> None:
        added.append(len(batch.examples.lengths))
        add(self, batch)

    monkeypatch.setattr(Collection, "_add", counted)
    monkeypatch.setattr("fedsim.data.spool.PART_RECORDS", 4096)
    monkeypatch.setattr("fedsim.data.ingest.shutil.rmtree", lambda *_, **__: None)  # to look at what was left
    found = build_store(config_of(path), LetterTokenizer(), output, progress=lambda what, *_: told.add(what))
    assert found.fingerprint == expected.fingerprint
    assert found.user_ids() == expected.user_ids()
    one, other = ({k: v for k, v in store.manifest.items() if k != "recipe"} for store in (found, expected))
    assert one == other
    kept = {file.name: file.stat().st_mtime_ns for file in (partial / "parts").rglob(PARTS)}
    assert parts.items() <= kept.items()
    assert sum(added) == RECORDS - gathered
    if stage == "Grouping by user":
        assert gathered >= share * RECORDS - 9 * 500
    if stage == "Writing the store" or (stage, share) == ("Comparing users", 1.0):
        assert "Grouping by user" not in told


def test_what_another_version_left_is_begun_anew(tmp_path, whole) -> None:
    path, expected = whole
    killed_at(path, tmp_path / "store", "Grouping by user", 0.3)
    mark = tmp_path / "store.partial" / "key"
    mark.write_text(mark.read_text().split()[0])
    for part in (tmp_path / "store.partial" / "parts").rglob(PARTS):
        part.write_bytes(b"of another kind")
    assert build_store(config_of(path), LetterTokenizer(), tmp_path / "store").fingerprint == expected.fingerprint


def test_parts_that_nobody_counted_are_not_read(tmp_path, whole, monkeypatch) -> None:
    path, expected = whole
    monkeypatch.setattr("fedsim.data.spool.PART_RECORDS", 4096)
    killed_at(path, tmp_path / "store", "Reading and encoding", 0.5)
    for part in list(tmp_path.rglob("examples-000000.parquet")):
        shutil.copy(part, part.with_name("examples-000900.parquet"))
    found = build_store(config_of(path), LetterTokenizer(), tmp_path / "store")
    assert found.fingerprint == expected.fingerprint
    assert found.manifest["duplicates"] == expected.manifest["duplicates"]


def test_parts_of_what_was_killed_are_not_taken_for_others(tmp_path, whole) -> None:
    """Whoever is still at work for a build that was killed writes where the next, of other data, does not look."""
    path, _ = whole
    output, other = tmp_path / "store", write_jsonl(tmp_path / "d.jsonl", [{"user_id": "new", "text": "a new text"}])
    killed_at(path, output, "Sorting by user", 0.0)
    late = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob(PARTS)}
    assert late

    def orphans(what: str, *_) -> None:
        for file, content in late.items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(content)

    config = dataclasses.replace(config_of(other), validation_fraction=0, test_fraction=0)
    assert build_store(config, LetterTokenizer(), output, progress=orphans).user_ids() == ["new"]


def test_parts_that_hold_more_than_was_written_are_refused(tmp_path, whole, monkeypatch) -> None:
    path, _ = whole
    monkeypatch.setattr("fedsim.data.spool.PART_RECORDS", 4096)

    def meddle(what: str, *_) -> None:
        if what == "Sorting by user":
            return
        if len(parts := sorted(tmp_path.rglob(PARTS))) > 1 and parts[-1].stat().st_size < parts[0].stat().st_size:
            shutil.copy(parts[0], parts[-1])

    with pytest.raises(Failure, match=r"hold 20,\d+ examples where 20,000 were written.*store\.partial"):
        build_store(config_of(path), LetterTokenizer(), tmp_path / "store", progress=meddle)
