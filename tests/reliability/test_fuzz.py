"""Anything may be read from a disk or come in a message: only the errors that are meant to come out of it do.

FEDSIM_FUZZ_SECONDS sets how long each fuzzer runs, all of them at the same time; a minute where CI is set. `make fuzz`
runs them for longer, and keeps what they find.
"""

import os
from pathlib import Path

import fuzzing
import pytest
from disk_fuzzers import charges, checkpoint, configuration, ingest, ledger
from fuzzing import run_for
from hypothesis import strategies as st
from message_fuzzers import evaluations, replies, requests, updates

SECONDS = float(os.environ.get("FEDSIM_FUZZ_SECONDS", "60" if os.environ.get("CI") else "4"))
FUZZERS = (configuration, ledger, charges, checkpoint, ingest, requests, replies, updates, evaluations)


def test_no_fuzzer_finds_anything(tmp_path: Path) -> None:
    children = {}
    for make in FUZZERS:
        folder = tmp_path / make.__name__
        folder.mkdir()
        child = os.fork()
        if child == 0:
            try:
                (folder / "examples").write_text(str(run_for(make, folder, SECONDS)))
                os._exit(0)
            except BaseException:
                import traceback

                said = traceback.format_exc() + fuzzing.keep(make.__name__)
                (folder / "finding").write_text(said)
                os._exit(1)
        children[make.__name__] = child
    codes = {name: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for name, child in children.items()}
    found = [(tmp_path / name / "finding").read_text() for name, code in codes.items() if code]
    assert not found, "\n\n".join(found)
    for name in codes:
        known, new = len(fuzzing.corpus_of(name)), (tmp_path / name / "examples").read_text()
        print(f"{name}: {known} inputs of the corpus and {new} new ones in {SECONDS:g} s")


def test_what_failed_once_is_tried_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "CORPUS", tmp_path)
    monkeypatch.setenv("FEDSIM_FUZZ_KEEP", "1")
    tried: list[int] = []

    def numbers(folder: Path) -> object:
        @fuzzing.fuzzing(st.integers(), st.binary())
        def fuzz(number: int, text: bytes) -> None:
            tried.append(number)
            assert number < 10

        return fuzz

    (tmp_path / "again").mkdir()
    with pytest.raises(AssertionError):
        run_for(numbers, tmp_path, 0)
    assert "{'number': 10, 'text': b''}" in fuzzing.keep("numbers")
    assert fuzzing.corpus_of("numbers") == [{"number": 10, "text": b""}]
    tried.clear()
    with pytest.raises(AssertionError):
        run_for(numbers, tmp_path / "again", 0)
    assert tried[0] == 10
