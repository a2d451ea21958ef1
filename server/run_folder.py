"""The folder that a run leaves behind."""

import json
import os
from pathlib import Path
from typing import Any

from fedsim.errors import InvalidInput


class RunFolder:
    """A run's results on disk.

    Args:
        path: The folder; made if absent.

    Raises:
        InvalidInput: When the folder cannot be made or written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InvalidInput("output", str(path), "a folder that can be written", f"{error.strerror}.") from None

    @property
    def config(self) -> Path:
        """The resolved configuration, JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON line an evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """What was charged, one JSON line a release."""
        return self.path / "ledger.jsonl"

    @property
    def privacy(self) -> Path:
        """The privacy statement, JSON."""
        return self.path / "privacy.json"

    @property
    def summary(self) -> Path:
        """The run's outcome, JSON."""
        return self.path / "summary.json"

    @property
    def model(self) -> Path:
        """The fine-tuned model in Hugging Face format."""
        return self.path / "model"

    def append_metrics(self, values: dict[str, Any]) -> None:
        """Add one line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All metrics so far; a last line that was cut off by a crash is left out."""
        lines = self.metrics.read_text(encoding="utf-8").split("\n") if self.metrics.exists() else []
        return [json.loads(line) for line in lines[:-1]]


def write_json(path: Path, values: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
