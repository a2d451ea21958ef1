"""Rows a second out of text files, beside what the format's parser alone takes: `python -m benchmarks.read_files`.

A CSV file without quotes, one with every field in quotes, one whose texts have several lines, a damaged one, and JSON
lines. Processor time, the best of several repetitions. Ends with one JSON line.
"""

import csv
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command_line import run_benchmark
from fedsim.data.files import read_files

WANTED = {"data.user-column": "user_id", "data.text-column": "text"}
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "more", "words", "follow"]


@dataclass(frozen=True, kw_only=True)
class ReadingBenchmark:
    """Read synthetic files."""

    rows: int = 200_000
    """Rows of each file."""
    repetitions: int = 3
    """The fastest counts."""

    def run(self) -> None:
        results = {}
        with tempfile.TemporaryDirectory(prefix="reading-benchmark-") as folder:
            for path in write_files(Path(folder), self.rows):
                rows, seconds = self._fastest(lambda path=path: sum(map(len, read_files([path], WANTED))))
                _, alone = self._fastest(lambda path=path: parse(path))
                results[path.name] = {"rows_per_second": rows / seconds, "over_parser": seconds / alone}
                print(f"{path.name:16} {rows / seconds:9,.0f} rows/s  {seconds / alone:.2f} × the parser alone")
        print(json.dumps({"benchmark": "read-files", "rows": self.rows, "results": results}))

    def _fastest(self, work: Callable[[], int]) -> tuple[int, float]:
        best = float("inf")
        for _ in range(self.repetitions):
            start = time.process_time()
            rows = work()
            best = min(best, time.process_time() - start)
        return rows, best


def write_files(folder: Path, rows: int) -> list[Path]:
    """The same texts, without quotes and line breaks in the first file."""
    generator = random.Random(1)
    texts = [" ".join(generator.choices(WORDS, k=25)) for _ in range(rows)]
    quoted = [text.replace(" and ", ' "and", ') if n % 3 else text for n, text in enumerate(texts)]
    lines = [text.replace(" then ", "\nthen, ") if n % 3 else text for n, text in enumerate(quoted)]
    tables = {"plain.csv": (texts, csv.QUOTE_MINIMAL), "quoted.csv": (quoted, csv.QUOTE_ALL)}
    tables |= {"lines.csv": (lines, csv.QUOTE_MINIMAL), "damaged.csv": (lines, csv.QUOTE_MINIMAL)}
    for name, (values, quoting) in tables.items():
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, quoting=quoting)
            writer.writerow(["user_id", "text"])
            for number, text in enumerate(values):
                if name == "damaged.csv" and number % 1000 == 999:
                    file.write(f'{number % 9000},"never closed\r\n')
                writer.writerow([number % 9000, text])
    with (folder / "lines.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"user_id": n % 9000, "text": text}) + "\n" for n, text in enumerate(lines))
    return [folder / name for name in (*tables, "lines.jsonl")]


def parse(path: Path) -> int:
    """Rows of the parser that Python brings along."""
    with path.open(newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            return sum(1 for _ in csv.reader(file))
        return sum(1 for _ in map(json.loads, file))


if __name__ == "__main__":
    sys.exit(run_benchmark(ReadingBenchmark))
