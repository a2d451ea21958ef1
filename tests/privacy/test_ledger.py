"""The ledger: charges survive crashes, and nothing else passes for a ledger."""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import (
    Adjacency,
    BinomialMixtureGaussian,
    Composed,
    Event,
    Gaussian,
    MixtureOfGaussians,
    PoissonSubsampledGaussian,
    Repeated,
)
from fedsim.privacy.ledger import HEADER, Ledger, LedgerDamaged, TornLine, merged, read_entries

ULS = PoissonSubsampledGaussian(sampling_probability=0.1, noise_multiplier=1.5)
ELS = BinomialMixtureGaussian(group_size=4, sampling_probability=0.05, noise_multiplier=2.0)
METRIC = Gaussian(noise_multiplier=20.0)

sigmas = st.floats(0.3, 50)
events = st.one_of(
    st.builds(Gaussian, noise_multiplier=sigmas),
    st.builds(PoissonSubsampledGaussian, sampling_probability=st.floats(1e-5, 1), noise_multiplier=sigmas),
    st.builds(
        BinomialMixtureGaussian,
        group_size=st.integers(1, 512),
        sampling_probability=st.floats(1e-5, 1),
        noise_multiplier=sigmas,
    ),
    st.builds(
        MixtureOfGaussians,
        sensitivities=st.just((0.0, 1.5)),
        probabilities=st.just((0.25, 0.75)),
        noise_multiplier=sigmas,
    ),
)


def no_sync(descriptor: int) -> None:
    """Does not wait for the disk, where a test opens hundreds of ledgers."""


QUICK = mock.patch("os.fsync", no_sync)


def written(path: Path, *charges: Event) -> bytes:
    with Ledger.open(path) as ledger:
        for round, event in enumerate(charges):
            ledger.charge(event, round=round)
    return path.read_bytes()


@settings(max_examples=30)
@given(st.lists(events, max_size=6))
def test_replay_gives_the_same_entries(charges: list[Event]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        with Ledger.open(path) as ledger:
            for round, event in enumerate(charges):
                ledger.charge(event, round=round, purpose="release" if round else "metric")
            before, whole = ledger.entries, ledger.event()
        with Ledger.open(path) as again:
            assert again.entries == before
            assert again.event() == whole
        assert [entry.event for entry in before] == charges
        assert read_entries(path) == before


def test_replay_gives_the_same_epsilon(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path) as ledger:
        assert ledger.epsilon(1e-5).upper == 0
        for round in range(3):
            ledger.charge(ULS, round=round)
        ledger.charge(METRIC, round=3, purpose="metric")
        epsilon = ledger.epsilon(1e-5)
    with Ledger.open(path) as again:
        assert again.epsilon(1e-5) == epsilon
        expected = Composed(events=(Repeated(event=ULS, count=3), Repeated(event=METRIC, count=1)))
        assert again.event() == expected
        assert epsilon == epsilon_bounds(expected, 1e-5)
        replaced = again.epsilon(1e-5, Adjacency.REPLACE_ONE_USER)
        assert replaced.upper >= epsilon.upper


def test_a_charge_is_on_disk_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is: all bytes written, then forced to disk, then the charge counts."""
    calls: list[str] = []
    write, sync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda fd, data: (calls.append("write"), write(fd, data[:50]))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), sync(fd))[1])
    with Ledger.open(tmp_path / "new" / "ledger.jsonl") as ledger:
        assert calls[-2:] == ["fsync", "fsync"], "the header, then the folder"
        calls.clear()
        ledger.charge(ULS, round=0)
    assert calls[-1] == "fsync"
    assert calls.count("fsync") == 1
    assert calls.count("write") > 1


def test_earlier_lines_are_never_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    before = written(path, ULS, ELS)
    assert written(path, METRIC).startswith(before)


def test_the_header_names_the_version(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    written(path)
    assert json.loads(path.read_text()) == {"format": "fedsim-ledger", "version": 1}
    path.write_bytes(HEADER.replace(b"1", b"2"))
    with pytest.raises(LedgerDamaged, match="line 1"):
        Ledger.open(path)


@QUICK
def test_a_file_cut_off_at_any_byte_loses_at_most_the_line_it_cuts(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    data = written(path, ULS, ELS, METRIC)
    ends = [index + 1 for index, byte in enumerate(data) if byte == ord("\n")]
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        complete = sum(end - 1 <= size for end in ends[1:])  # A line that lacks only its line break counts.
        torn = size > ends[0] and size not in ends and size + 1 not in ends
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ledger = Ledger.open(path)
        with ledger:
            assert [entry.event for entry in ledger.entries] == [ULS, ELS, METRIC][:complete], size
            assert [item.category for item in caught] == [TornLine] * torn, size
            ledger.charge(METRIC, round=9)
        assert read_entries(path)[complete:] == ledger.entries[complete:]
        assert data[: max([0, *(end for end in ends if end <= size)])] in path.read_bytes()


@settings(max_examples=200)
@given(data=st.data())
def test_any_changed_byte_is_refused_with_its_line(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder, QUICK:
        path = Path(folder) / "ledger.jsonl"
        content = written(path, ULS, ELS, METRIC)
        place = data.draw(st.integers(0, len(content) - 1))
        byte = data.draw(st.integers(0, 255).filter(lambda value: value != content[place]))
        path.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
        with pytest.raises(LedgerDamaged) as caught:
            Ledger.open(path)
        assert caught.value.line == content[:place].count(b"\n") + 1
        assert f"line {caught.value.line}" in str(caught.value)


@pytest.mark.parametrize("order", [(0, 2, 3), (0, 3), (0, 2, 1, 3), (0, 1, 1, 2, 3), (1, 2, 3)])
def test_missing_moved_and_repeated_lines_are_refused(tmp_path: Path, order: tuple[int, ...]) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = written(path, ULS, ULS, ULS).splitlines(keepends=True)
    path.write_bytes(b"".join(lines[index] for index in order))
    with pytest.raises(LedgerDamaged):
        Ledger.open(path)


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no line break, and no ledger")
    with pytest.raises(LedgerDamaged, match="line 1"):
        Ledger.open(path)
    assert path.read_text() == "no line break, and no ledger"


def test_two_writers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path):
        with pytest.raises(InvalidInput, match="no other run"):
            Ledger.open(path)
        program = f"from fedsim.privacy.ledger import Ledger; Ledger.open({str(path)!r})"
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert other.returncode != 0
        assert "no other run" in other.stderr
        assert read_entries(path) == ()
    Ledger.open(path).close()


def test_a_charge_that_fails_closes_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.open(path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            ledger.charge(ULS, round=0)
    with pytest.raises(InvalidInput, match="Open it again"):
        ledger.charge(ULS, round=0)
    with Ledger.open(path) as again:
        assert len(again) == 1, "it may have reached the disk, so it counts"


def test_numpy_numbers_are_written_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    event = PoissonSubsampledGaussian(sampling_probability=np.float32(0.25), noise_multiplier=np.float64(1.5))
    with Ledger.open(path) as ledger:
        ledger.charge(Repeated(event=event, count=np.int64(3)), round=np.int64(0))
        assert ledger.event() == merged((event, event, event))


@pytest.mark.parametrize("round", [-1, float("nan")])
def test_bad_rounds_are_refused(tmp_path: Path, round: float) -> None:
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger, pytest.raises(InvalidInput, match="round"):
        ledger.charge(ULS, round=round)


@given(st.lists(st.tuples(events, st.integers(0, 5)), max_size=6))
def test_merging_keeps_every_count(pairs: list[tuple[Event, int]]) -> None:
    whole = merged(
        Composed(events=(Repeated(event=Repeated(event=event, count=2), count=count),)) for event, count in pairs
    )
    expected: dict[Event, int] = {}
    for event, count in pairs:
        if count:
            expected[event] = expected.get(event, 0) + 2 * count
    assert {item.event: item.count for item in whole.events} == expected
    assert len(whole.events) == len(expected)


def test_a_line_that_is_json_but_no_object_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path) as ledger:
        ledger.charge(Gaussian(noise_multiplier=1.0), round=0)
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(LedgerDamaged, match="line 3"):
        Ledger.open(path)
