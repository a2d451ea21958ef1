"""What an ingest takes of memory does not grow with rows or users, in any of its passes.

Each size is ingested in a process of its own, with a limit that the smaller one reaches already.
`python -m benchmarks.ingest` measures any number.
"""

import shutil
from pathlib import Path

import pytest

from benchmarks.ingest import IngestBenchmark
from fedsim.data.records import Records, in_parts

GROWTH = 40
"""MiB that the most memory of a pass may differ by. Of the rows that there are more, tokens alone take 180 MB behind
the first pass; texts take 60 MB as Python has them in it, and users' names 80 MB."""
MOST = 1900
"""MiB: less than 2 GB, with a sort that may take 1 GB of them."""


@pytest.mark.parametrize(("from_parts", "fewer", "more"), [(False, 131_072, 524_288), (True, 800_000, 3_200_000)])
def test_no_pass_takes_more_memory_for_more_rows_and_users(
    tmp_path: Path, from_parts: bool, fewer: int, more: int
) -> None:
    found = []
    for rows in (fewer, more):
        folder = tmp_path / str(rows)
        folder.mkdir()
        benchmark = IngestBenchmark(rows=rows, users=rows // 2, memory_limit="64MB", from_parts=from_parts)
        found.append({name: one["peak_mib"] for name, one in benchmark.measured(folder)["passes"].items()})
    passes = ["Sorting by user", "Grouping by user", "Comparing users", "Writing the store"] if from_parts else []
    passes = passes or ["Reading and encoding"]
    growth = {name: found[1][name] - found[0][name] for name in passes}
    assert all(one < GROWTH for one in growth.values()), growth


def test_ten_million_rows_take_less_than_two_gigabytes(tmp_path: Path) -> None:
    found = IngestBenchmark(rows=10_000_000, users=1_000_000).measured(tmp_path)
    shutil.rmtree(tmp_path)  # 2 GB that nobody looks at afterwards
    assert found["peak_mib"] < MOST, found["passes"]


@pytest.mark.parametrize(
    "value",
    ["x" * 600, [{"role": "user", "content": "x" * 600}], [["x" * 300], ("x" * 300,)], {"a": {"b": ["x" * 600]}}],
    ids=["text", "conversation", "lists", "mappings"],
)
def test_parts_are_cut_by_all_the_text_in_them(value) -> None:
    columns = {"user": ["u"] * 2, "value": [value] * 2, "number": [1.0, None]}
    chunks = [Records(columns=columns, origin="d", first=1) for _ in range(10)]
    assert [len(part) for part in in_parts(iter(chunks), 10**6, 3600)] == [3, 3, 3, 1]
