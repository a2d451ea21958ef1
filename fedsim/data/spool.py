"""First pass over the data: check every record, encode its text, and set the examples down in parts.

A finished part is never made again: an interrupted ingest reads the source from the beginning (cheap) but encodes
(dear) only what is missing.
"""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsim.data.config import DataConfig
from fedsim.data.encode import TextEncoder
from fedsim.data.owners import MIXED
from fedsim.data.part import PartWriter
from fedsim.data.part_pool import PartPool
from fedsim.data.records import Records, Tally, in_parts
from fedsim.data.sources import Progress, Source
from fedsim.errors import InvalidInput

PART_RECORDS = 1 << 16
PART_CHARACTERS = 1 << 25


@dataclass(kw_only=True)
class Spooled:
    """What was read and set down.

    Attributes:
        files: The parts, in order: what else lies beside them is not of this data.
        records: Records read.
        bad: Those left out.
        doubtful: Those read that may be several.
    """

    files: list[Path] = field(default_factory=list)
    records: int = 0
    bad: Tally = field(default_factory=Tally)
    doubtful: Tally = field(default_factory=Tally)

    @property
    def examples(self) -> int:
        """How many the parts hold."""
        return self.records - self.bad.total


def spool(source: Source, config: DataConfig, encoder: TextEncoder, folder: Path, progress: Progress) -> Spooled:
    """Write the source's examples as Parquet parts, going on where an earlier call stopped.

    Args:
        source: What to read.
        config: Resolved configuration.
        encoder: The tokenizer.
        folder: Where the parts go, `examples-*.parquet`; of one source, configuration and tokenizer alone.
        progress: Told how far the source has been read.

    Raises:
        InvalidInput: For a bad row when config.bad_rows is "refuse".
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = PartWriter(folder=folder, columns=source.columns, config=config, encoder=encoder)
    spooled = Spooled()
    waiting: deque[tuple[Future[dict[str, Any]], float]] = deque()

    def take() -> None:
        """What was found in the earliest part that is not taken yet."""
        made, done = waiting.popleft()
        found = made.result()
        refuse_bad_rows(config, found["bad_rows"])
        spooled.bad.merge(found["bad_rows"])
        spooled.doubtful.merge(found["doubtful_rows"])
        progress("Reading and encoding", done, source.total)

    with PartPool(writer) as pool:
        for number, part in enumerate(in_parts(source.read(), PART_RECORDS, PART_CHARACTERS)):
            waiting.append((_part(pool, writer, number, spooled.records, part), part[-1].done))
            spooled.files.append(writer.file(number))
            spooled.records += sum(map(len, part))
            while len(waiting) > pool.most_waiting:
                take()
        while waiting:
            take()
    progress("Reading and encoding", source.total or spooled.records, source.total or spooled.records)
    return spooled


def refuse_bad_rows(config: DataConfig, found: Mapping[str, Any]) -> None:
    """Raise InvalidInput, naming the first, where records were left out and config.bad_rows is "refuse"."""
    found = {reason: entry for reason, entry in found.items() if reason != MIXED}  # which are good, and of no use
    if found and config.bad_rows == "refuse":
        reason, entry = next(iter(found.items()))
        hint = "Mend the data, or use --data.bad-rows skip to leave such rows out."
        raise InvalidInput("data", entry["first"][0], f"a good row ({reason})", hint)


def _part(pool: PartPool, writer: PartWriter, number: int, first: int, part: list[Records]) -> Future[dict[str, Any]]:
    """What is found in a part, now or once it is made."""
    found = writer.found(number)
    if found is None:
        return pool.write(number, first, part)
    known: Future[dict[str, Any]] = Future()
    known.set_result(found)
    return known
