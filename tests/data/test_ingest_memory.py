"""What an ingest takes of memory does not grow with rows or users, in any of its passes.

Each size is ingested in a process of its own, with a limit that the smaller one reaches already; so does it the
million names and sizes that are written at a time.
`python -m benchmarks.ingest` measures any number.
"""

import shutil
from pathlib import Path

import pytest
from readable_stores import write_jsonl

from benchmarks.ingest import IngestBenchmark
from fedsim.data.config import DataConfig
from fedsim.data.ingest import build_store
from fedsim.data.part import PartWriter
from fedsim.data.records import Records, in_parts
from fedsim.data.write import StoreWriter
from fedsim.errors import InvalidInput

MOST = 1900
"""MiB: less than 2 GB, with a sort that may take 1 GB of them."""


@pytest.mark.parametrize(
    ("from_parts", "fewer", "more", "most"),
    [
        # Of the rows that there are more, the texts take 60 MB as Python has them.
        (False, 131_072, 524_288, 40),
        # Their tokens take 120 MB, and their users' names 100 MB as Python has them. DuckDB itself takes 50 MB more or
        # less from one time to the next.
        (True, 1_600_000, 3_200_000, 60),
    ],
)
def test_no_pass_takes_more_memory_for_more_rows_and_users(
    tmp_path: Path, from_parts: bool, fewer: int, more: int, most: int
) -> None:
    found = []
    for rows in (fewer, more):
        folder = tmp_path / str(rows)
        folder.mkdir()
        benchmark = IngestBenchmark(rows=rows, users=rows * 15 // 16, memory_limit="64MB", from_parts=from_parts)
        found.append({name: one["peak_mib"] for name, one in benchmark.measured(folder)["passes"].items()})
    passes = ["Sorting by user", "Grouping by user", "Comparing users", "Writing the store"] if from_parts else []
    passes = passes or ["Reading and encoding"]
    growth = {name: found[1][name] - found[0][name] for name in passes}
    assert all(mib < most for mib in growth.values()), growth


@pytest.mark.parametrize(
    ("from_parts", "rows"),
    [
        # Of the first pass, with all its processes, more than the three parts of each that there are at once.
        (False, 600_000),
        (True, 10_000_000),
    ],
)
def test_ten_million_rows_take_less_than_two_gigabytes(tmp_path: Path, from_parts: bool, rows: int) -> None:
    """The passes by themselves: the first one takes as much of any number of rows, and most of the time."""
    found = IngestBenchmark(rows=rows, users=rows // 10, from_parts=from_parts).measured(tmp_path)
    shutil.rmtree(tmp_path)  # 2 GB that nobody looks at afterwards
    assert found["peak_mib"] < MOST, found["passes"]


def test_too_little_memory_is_told_in_one_sentence_and_the_build_goes_on(tmp_path, tokenizer, monkeypatch) -> None:
    records = [{"user_id": f"u{n % 999}", "text": f"text number {n}"} for n in range(20_000)]
    path = str(write_jsonl(tmp_path / "data.jsonl", records))
    with pytest.raises(InvalidInput, match=r"data\.memory-limit is '200KB'.*goes on where"):
        build_store(DataConfig(source="files", path=path, memory_limit="200KB"), tokenizer, tmp_path / "store")
    monkeypatch.setattr(PartWriter, "write", None)
    config = DataConfig(source="files", path=path)

    def starved(*_):  # while the sorted rows are read, Arrow has it from DuckDB, in its words
        raise OSError("Out of Memory Error: failed to pin block of size 256.0 KiB (60.9 MiB/61.0 MiB used)")

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "append", starved)
        with pytest.raises(InvalidInput, match=r"data\.memory-limit is '1GB'.*goes on where"):
            build_store(config, tokenizer, tmp_path / "store")
    assert build_store(config, tokenizer, tmp_path / "store").num_users == 999


@pytest.mark.parametrize(
    "value",
    ["x" * 600, [{"role": "user", "content": "x" * 600}], [["x" * 300], ("x" * 300,)], {"a": {"b": ["x" * 600]}}],
    ids=["text", "conversation", "lists", "mappings"],
)
def test_parts_are_cut_by_all_the_text_in_them(value) -> None:
    columns = {"user": ["u"] * 2, "value": [value] * 2, "number": [1.0, None]}
    chunks = [Records(columns=columns, origin="d", first=1) for _ in range(10)]
    assert [len(part) for part in in_parts(iter(chunks), 10**6, 3600)] == [3, 3, 3, 1]
