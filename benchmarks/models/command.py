"""Measures the models, prints a line for each, and writes the tables.

Each is made of transformers' own configuration classes, without a download, saved with a tokenizer, and loaded by
`load_model` as a user's would be. Of each, in each form of training, it is measured which path its clipped sum takes,
how far that is from the loop over users, what memory it takes over the loop's, whether a row of the greatest length is
read, and whether its export reads back with an equal loss; or it is told in which sentence it was refused. Writes
docs/models-table.md. Ends with one JSON line, and with 1 where something failed or differs.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models.measure import all_cases, measure
from benchmarks.models.table import line, markdown, summary
from fedsim.errors import InvalidInput

TABLE = Path(__file__).resolve().parents[2] / "docs" / "models-table.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True)
class Benchmark:
    """Measure what becomes of tiny models of many families."""

    only: str = ""
    """Measure those alone whose name (a family, a slash and a form) holds this text; docs/models-table.md stays."""

    def run(self) -> int:
        """The exit code.

        Raises:
            InvalidInput: Nothing has such a name.
        """
        start, findings = time.process_time(), {}
        for case in all_cases():
            if self.only.lower() in case.name.lower():
                findings[case] = measure(case)
                print(line(case, findings[case]), flush=True)
        if not findings:
            raise InvalidInput("only", self.only, "part of a name", f"Names are like {all_cases()[0].name}.")
        if not self.only:
            _write(markdown(findings))
        found = summary(findings)
        print(json.dumps(found | {"models.processor_seconds": round(time.process_time() - start, 1)}))
        return int(found["models.faults"] > 0 or found["models.apart"] > 0)


def _write(tables: str) -> None:
    text = TABLE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    TABLE.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{after}", encoding="utf-8")
