"""Checkpoints: whole or absent, verified, and never in the way of training."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedsim.errors import InvalidInput
from fedsim.terminal import speak
from server import checkpoint as module
from server.checkpoint import Checkpoint, CheckpointDamaged, CheckpointWriter, read, read_latest, stored, write

ARRAYS = {"parameters": np.arange(5, dtype=np.float32), "optimizer/step": np.array(3.0), "empty": np.zeros((0, 2))}


@pytest.fixture(autouse=True)
def speaking() -> None:
    """As in a program: warnings are printed."""
    speak()


def checkpoint(round: int) -> Checkpoint:
    return Checkpoint(round=round, arrays=ARRAYS, values={"seconds": 0.1, "plan": {"name": "ü"}})


def writer(folder: Path, keep: int = 2) -> CheckpointWriter:
    return CheckpointWriter(folder, rounds=3, minutes=0, keep=keep)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    back = read(write(tmp_path, checkpoint(7)))
    assert (back.round, back.values) == (7, checkpoint(7).values)
    assert set(back.arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(back.arrays[name], array)
        assert (back.arrays[name].dtype, back.arrays[name].shape) == (array.dtype, array.shape)


@pytest.mark.parametrize("name", [module.ARRAYS, module.MANIFEST])
def test_any_changed_cut_or_missing_byte_is_found(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, checkpoint(1))
    content = (path / name).read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 0x15
        (path / name).write_bytes(changed)
        with pytest.raises(CheckpointDamaged):
            read(path)
    for size in (0, 1, len(content) // 2, len(content) - 1):
        (path / name).write_bytes(content[:size])
        with pytest.raises(CheckpointDamaged):
            read(path)
    (path / name).unlink()
    with pytest.raises(CheckpointDamaged):
        read(path)


def test_a_damaged_checkpoint_leaves_the_one_before_it_usable(tmp_path: Path, capsys) -> None:
    write(tmp_path, checkpoint(1))
    newest = write(tmp_path, checkpoint(2))
    (newest / module.ARRAYS).write_bytes(b"")
    latest = read_latest(tmp_path)
    assert latest is not None
    assert latest.round == 1
    assert "00000002" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "00000001")
    with pytest.raises(InvalidInput, match="undamaged"):
        read_latest(tmp_path)
    assert read_latest(tmp_path / "absent") is None


def test_another_version_and_another_format_are_refused(tmp_path: Path) -> None:
    for key, value in (("version", 2), ("format", "other"), ("arrays", 3), ("arrays", {"bytes": "x"})):
        path = write(tmp_path, checkpoint(1))
        manifest = json.loads((path / module.MANIFEST).read_text())
        manifest.pop("checksum")
        manifest[key] = value
        manifest["checksum"] = module._checksum(manifest)
        (path / module.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(CheckpointDamaged):
            read(path)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    path = write(tmp_path, checkpoint(1))
    content = pickle.dumps(Harm())
    (path / module.ARRAYS).write_bytes(content)
    manifest = json.loads((path / module.MANIFEST).read_text())
    manifest.pop("checksum")
    manifest["arrays"] = {"bytes": len(content), "sha256": module._file_checksum(path / module.ARRAYS)}
    manifest["checksum"] = module._checksum(manifest)
    (path / module.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointDamaged):
        read(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_disk_that_fails_keeps_the_last_good_one_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, code: int, call: str
) -> None:
    writing = writer(tmp_path)
    writing.write(checkpoint(1), wait=True)

    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(Path if call != "fsync" else os, call, fail)
        writing.write(checkpoint(2), wait=True)
    assert writing.failure is not None
    printed = capsys.readouterr().err
    assert os.strerror(code) in printed
    assert "round 1 stays usable" in printed
    latest = read_latest(tmp_path)
    assert latest is not None
    assert latest.round == 1
    writing.write(checkpoint(3), wait=True)
    assert writing.failure is None
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(module.PARTIAL)] == []


def test_a_really_full_disk(tmp_path: Path) -> None:
    """A file size limit makes the kernel refuse, as a full disk does, in the middle of the arrays."""
    child = os.fork()
    if child == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writing = writer(tmp_path)
        writing.write(checkpoint(1), wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        large = Checkpoint(round=2, arrays={"parameters": np.zeros(100_000)}, values={})
        writing.write(large, wait=True)
        os._exit(0 if writing.failure is not None else 9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    latest = read_latest(tmp_path)
    assert latest is not None
    assert latest.round == 1


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    writing = writer(tmp_path, keep=2)
    for round in range(1, 6):
        writing.write(checkpoint(round))
    writing.join()
    assert [path.name for path in stored(tmp_path)] == ["00000005", "00000004"]
    # A run that was set back forgets what lies ahead: it belongs to another course of the run.
    set_back = CheckpointWriter(tmp_path, rounds=1, minutes=0, keep=2, good=1)
    set_back.write(checkpoint(2), wait=True)
    assert [path.name for path in stored(tmp_path)] == ["00000002"]


def test_the_checkpoint_that_a_run_came_from_is_not_put_at_risk(tmp_path: Path) -> None:
    path = write(tmp_path, checkpoint(4))
    before = (path / module.MANIFEST).stat().st_ino
    CheckpointWriter(tmp_path, rounds=1, minutes=0, keep=1, good=4).write(checkpoint(4), wait=True)
    assert (path / module.MANIFEST).stat().st_ino == before


def test_when_one_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    by_rounds = CheckpointWriter(tmp_path, rounds=3, minutes=0, keep=1)
    assert [by_rounds.due(round) for round in (1, 2, 3, 6)] == [False, False, True, True]
    by_minutes = CheckpointWriter(tmp_path, rounds=0, minutes=2, keep=1)
    assert not by_minutes.due(3)
    now += 121
    assert by_minutes.due(1)
    by_minutes.write(checkpoint(1), wait=True)
    assert not by_minutes.due(2)
    assert not CheckpointWriter(tmp_path, rounds=0, minutes=0, keep=1).due(5)


def test_files_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "00000009.partial").mkdir()
    (tmp_path / "12notes").mkdir()
    (tmp_path / "34").write_text("a file")
    assert stored(tmp_path) == []
    assert read_latest(tmp_path) is None
