"""The folder that a run leaves behind."""

import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

from fedsim.disk import require_writable
from fedsim.errors import Failure, InvalidInput
from server.results.hold import Hold

log = logging.getLogger(__name__)

FORMAT = 3
"""Of config.json; version 0.1 wrote none. A run goes on only with the version that began it."""
DATA = "data"
"""The data's fingerprint in what makes a resumed run the same run."""


class RunFolder:
    """A run's results on disk.

    Args:
        path: The folder. It is made by `make`, when there is something to keep: what is refused leaves none.
        new: Whether the folder may be absent.

    Raises:
        InvalidInput: When it may not be absent, and is.
    """

    def __init__(self, path: str | Path, *, new: bool = True) -> None:
        self.path = Path(path)
        self.waiting: list[str] = []
        """Lines of metrics that the disk has not taken yet."""
        if not new and not self.path.is_dir():
            raise InvalidInput("resume", str(path), "the folder of a run", "There is no such folder.")
        self.hold = Hold(self.path)
        self._made: list[Path] | None = None
        self._there: set[Path] = set()

    def make(self) -> None:
        """Make the folder, and those it is in, where they are not there, and hold it against other processes.

        Raises:
            InvalidInput: Another run has begun there meanwhile, or is about to.
        """
        self.require_unused()
        missing = [place for place in (self.path, *self.path.parents) if not place.exists()]
        self.hold.take("output")
        # Only now does nobody else write there: what another wrote in between is found.
        if (used := self._used()) is not None:
            self.hold.let_go()
            raise used
        self._made, self._there = missing, set(self.path.iterdir())

    def keep(self) -> None:
        """From here on what is in the folder stays, however the run ends."""
        self._made = None

    @contextmanager
    def undone_unless_kept(self, *others: str) -> Iterator[None]:
        """Within it a run begins; where it is refused before `keep`, all that it made and wrote goes again. After it
        the folder is not held any more.

        Args:
            others: Names of files that are written in the folder beside a run's own.
        """
        with self.hold:
            try:
                yield
            except BaseException:
                if self._made is not None and not any(self.path.glob(f"*/{self.config.name}")):
                    self._undo(self._made, others)
                raise

    def _undo(self, made: list[Path], others: Iterable[str]) -> None:
        # Only what bears a run's names and was not there before goes (somebody may have checkpoints of their own), and
        # no folder that has anything else in it: others may write there.
        files = {self.config, self.secret, self.bands, self.ledger, self.paths, self.metrics}
        with suppress(OSError):
            for path in (files | {self.path / name for name in others}) - self._there:
                path.unlink(missing_ok=True)
            for path in {self.checkpoints, self.releases, *self._leftovers()} - self._there:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            self.hold.let_go()
            for place in made:
                place.rmdir()

    @property
    def config(self) -> Path:
        """The resolved configuration, JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON line a round, and one before the first."""
        return self.path / "metrics.jsonl"

    @property
    def bands(self) -> Path:
        """What correlating noise over rounds promised, before anything was trained, JSON."""
        return self.path / "bands.json"

    @property
    def ledger(self) -> Path:
        """What was charged, one JSON line a release."""
        return self.path / "ledger.jsonl"

    @property
    def privacy(self) -> Path:
        """The privacy statement, JSON."""
        return self.path / "privacy.json"

    @property
    def card(self) -> Path:
        """The model's card, Markdown."""
        return self.path / "README.md"

    @property
    def audit_not_private(self) -> Path:
        """What an audit computed from training users without noise, JSON; never in a folder to be released."""
        return self.path / "audit_not_private.json"

    @property
    def summary(self) -> Path:
        """The run's outcome, JSON."""
        return self.path / "summary.json"

    @property
    def paths(self) -> Path:
        """Which way each layer's gradients took on the workers, JSON; nothing in it is of the data."""
        return self.path / "paths.json"

    @property
    def secret(self) -> Path:
        """The seeds, for the owner's eyes, while the run is unfinished."""
        return self.path / "secret.json"

    @property
    def checkpoints(self) -> Path:
        """What the run can be resumed from, while it is unfinished."""
        return self.path / "checkpoints"

    @property
    def releases(self) -> Path:
        """Releases that a resumed run may have to repeat, while it is unfinished."""
        return self.path / "releases"

    @property
    def given_up(self) -> Path:
        """Why going on would only spend more, JSON."""
        return self.path / "given_up.json"

    @property
    def finished(self) -> bool:
        """Whether the run's outcome is written."""
        return self.summary.exists()

    @property
    def model(self) -> Path:
        """The fine-tuned model in Hugging Face format."""
        return self.path / "model"

    def require_unused(self) -> None:
        """Refuse to mix a new run with one that is there already, and a place where nothing can be written.

        Raises:
            InvalidInput: When the folder holds a run, or charges of one, or another process is at work in it, or it
                could not be written.
        """
        require_writable(self.path)
        self.hold.require_free("output")
        if (used := self._used()) is not None:
            raise used

    def _used(self) -> InvalidInput | None:
        """What to say of a folder with a run in it."""
        used = [path.name for path in (self.config, self.ledger) if path.exists()]
        if not used:
            return None
        hint = f"It has {used[0]}. Go on with that run by --resume {self.path}, or name another folder."
        return InvalidInput("output", str(self.path), "a folder without a run in it", hint)

    def require_hope(self) -> None:
        """Refuse to go on with a run that was given up.

        Raises:
            Failure: Says again why it was.
        """
        if self.given_up.exists():
            raise Failure(json.loads(self.given_up.read_text(encoding="utf-8"))["reason"])

    def write_config(self, **values: Any) -> None:
        """Write config.json: the resolved configuration and what makes a resumed run the same run."""
        write_json(self.config, {"format": FORMAT, **values})

    def read_config(self) -> dict[str, Any]:
        """What config.json holds of a run that can go on.

        Raises:
            InvalidInput: When there is no such run.
        """
        try:
            written: dict[str, Any] = json.loads(self.config.read_text(encoding="utf-8"))
            if not (isinstance(written["config"], dict) and isinstance(written["identity"]["settings"], dict)):
                reason = "its config.json is of another form"
            elif written.get("format") != FORMAT:
                reason = "another version of fedsim wrote it, which must finish it: rounds would differ in detail"
            else:
                return written
        except FileNotFoundError:
            reason = "it has no config.json"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"its config.json cannot be read: {error}"
        raise InvalidInput("resume", str(self.path), "the folder of a run", f"{reason[0].upper()}{reason[1:]}.")

    def read_summary(self) -> dict[str, Any]:
        """The outcome of a finished run."""
        summary: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        return summary

    def remove_leftovers(self) -> None:
        """Remove what a killed process left half-written; what is finished stays."""
        for path in self._leftovers():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _leftovers(self) -> list[Path]:
        return [*self.path.glob("*.partial"), *self.path.glob(f".{self.model.name}-*")]

    def remove_unfinished(self) -> None:
        """Remove what only an unfinished run needs: the seeds, which could undo the noise, the checkpoints and
        releases that it could go on from, and the fingerprint of the data, which no noise protects: whoever knows all
        users but one could try out who that is."""
        self.secret.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.releases):
            shutil.rmtree(folder, ignore_errors=True)
        written = self.read_config()
        if written["identity"].pop(DATA, None) is not None:
            write_json(self.config, written)
        self.remove_leftovers()

    def cut_metrics(self, size: int) -> None:
        """Forget the lines after so many bytes: the rounds that they measured will run again."""
        if self.metrics.exists() and self.metrics.stat().st_size > size:
            os.truncate(self.metrics, size)

    @property
    def metrics_size(self) -> int:
        """Bytes of metrics so far."""
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def append_metrics(self, values: dict[str, Any]) -> None:
        """Add one line to the metrics; where the disk refuses it waits, and training does not."""
        waited = bool(self.waiting)
        self.waiting.append(json.dumps(values) + "\n")
        try:
            self.write_metrics()
        except OSError as error:
            if not waited:  # every round has a line, which is no news
                log.warning("%s takes no more (%s); further lines wait", self.metrics, error.strerror)

    def take_back(self, round: int) -> dict[str, Any]:
        """Remove the last line of the metrics if it is of this round; returns what it held, nothing of another."""
        lines = self.waiting or self._lines()
        if not lines or json.loads(lines[-1])["round"] != round:
            return {}
        last: dict[str, Any] = json.loads(lines[-1])
        if self.waiting:
            self.waiting.pop()
        else:
            self.cut_metrics(self.metrics_size - len(lines[-1].encode()))
        return last

    def write_metrics(self) -> None:
        """Write the lines that wait.

        Raises:
            OSError: They cannot be written: they wait on, and the file is as it was.
        """
        if not self.waiting:
            return
        size = self.metrics_size
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.writelines(self.waiting)
        except OSError:
            with suppress(OSError):
                self.cut_metrics(size)
            raise
        self.waiting = []

    def read_metrics(self) -> list[dict[str, Any]]:
        """All metrics so far; a last line that was cut off by a crash is left out."""
        return [json.loads(line) for line in self._lines()]

    def _lines(self) -> list[str]:
        """Of the metrics, ends included; one that was cut off has none and is left out."""
        text = self.metrics.read_text(encoding="utf-8") if self.metrics.exists() else ""
        return [f"{line}\n" for line in text.split("\n")[:-1]]


def new_output_folder(kind: str) -> str:
    """A folder under runs/ that is not there yet, named after the moment: its microseconds tell apart what a script
    starts at once, long before any of it makes its folder."""
    named = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S-%f}-{kind}"
    further = (named.with_name(f"{named.name}-{number}") for number in count(2))
    return str(next(folder for folder in chain([named], further) if not folder.exists()))


def without_infinities(value: Any) -> Any:
    """The same values with null for what JSON cannot hold: an infinite ε."""
    if isinstance(value, dict):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, values: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
