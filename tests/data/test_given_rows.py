"""Rows that are given as objects, and a cache that takes no more of them."""

import errno

import pytest

from fedsim.data import given
from fedsim.errors import InvalidInput

ROWS = [{"user_id": "ann", "text": "a text"}]


def test_a_full_cache_names_its_variable(tmp_path, monkeypatch) -> None:
    def full(*_) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(given, "_write_lines", full)
    with pytest.raises(InvalidInput, match=r"FEDSIM_CACHE is .*No space left.*Set the environment variable"):
        given.keep_rows(ROWS, tmp_path, ["user_id", "text"])
    assert list(tmp_path.rglob("*.jsonl")) == []


def test_errors_of_what_gives_the_rows_are_its_own(tmp_path) -> None:
    def rows():
        yield from ROWS
        raise FileNotFoundError("rows.csv")

    with pytest.raises(FileNotFoundError):
        given.keep_rows(rows(), tmp_path, ["user_id", "text"])


def test_what_a_path_leads_through_must_be_writable_as_json(tmp_path) -> None:
    rows = [{"author": {"id": object()}, "other": object(), "text": "a text"}]
    with pytest.raises(InvalidInput, match=r"rows\[0\]\['author'\] is 'dict'"):
        given.keep_rows(rows, tmp_path, ["author.id", "text"])
    kept = given.keep_rows(rows, tmp_path, ["text"])
    assert kept.read_text() == '{"text": "a text"}\n'
