"""First pass over the data: check every record, encode its text, and set the examples down in parts.

A finished part is never made again: an interrupted ingest reads the source from the beginning (cheap) but encodes
(dear) only what is missing.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedsim.data.check import good_records
from fedsim.data.config import DataConfig
from fedsim.data.encode import TextEncoder
from fedsim.data.records import Records, Tally, in_parts
from fedsim.data.sources import Progress, Source
from fedsim.data.user_ids import loose_form, normal_form
from fedsim.errors import InvalidInput

PART_RECORDS = 1 << 16
PART_CHARACTERS = 1 << 25


def spool(
    source: Source, config: DataConfig, encoder: TextEncoder, folder: Path, progress: Progress
) -> tuple[int, Tally, Tally]:
    """Write the source's examples as Parquet parts, going on where an earlier call stopped.

    Args:
        source: What to read.
        config: Resolved configuration.
        encoder: The tokenizer.
        folder: Where the parts go: `examples-*.parquet` and `users-*.parquet`, the latter in place first.
        progress: Told how far the source has been read.

    Returns:
        (records read, those left out, those read that may be several).

    Raises:
        InvalidInput: For a bad row when config.bad_rows is "refuse".
    """
    folder.mkdir(parents=True, exist_ok=True)
    bad, doubtful = Tally(), Tally()
    read = 0
    for number, part in enumerate(in_parts(source.read(), PART_RECORDS, PART_CHARACTERS)):
        file = folder / f"examples-{number:06d}.parquet"
        if file.is_file():
            metadata = pq.read_metadata(file).metadata
            found = {name: json.loads(metadata[name.encode()]) for name in ("bad_rows", "doubtful_rows")}
        else:
            found = _write_part(part, read, source, config, encoder, folder, number)
        refuse_bad_rows(config, found["bad_rows"])
        bad.merge(found["bad_rows"])
        doubtful.merge(found["doubtful_rows"])
        read += sum(map(len, part))
        progress("Reading and encoding", part[-1].done, source.total)
    progress("Reading and encoding", source.total or read, source.total or read)
    return read, bad, doubtful


def refuse_bad_rows(config: DataConfig, found: Mapping[str, Any]) -> None:
    """Raise InvalidInput, naming the first, where records were left out and config.bad_rows is "refuse"."""
    if found and config.bad_rows == "refuse":
        reason, entry = next(iter(found.items()))
        hint = "Mend the data, or use --data.bad-rows skip to leave such rows out."
        raise InvalidInput("data", entry["first"][0], f"a good row ({reason})", hint)


def user_key(user: str, split_seed: int) -> bytes:
    """The keyed hash that orders users and so assigns them to splits: 16 bytes, big-endian."""
    key = hashlib.blake2b(f"fedsim split {split_seed}".encode(), digest_size=32).digest()
    return hashlib.blake2b(user.encode(), key=key, digest_size=16).digest()


def _write_part(
    part: list[Records], read: int, source: Source, config: DataConfig, encoder: TextEncoder, folder: Path, number: int
) -> dict[str, Any]:
    bad, doubtful = Tally(), Tally()
    examples = good_records(
        part,
        source.columns,
        encoder.render,
        bad,
        doubtful=doubtful,
        normalised=config.user_ids == "normalised",
        missing_ids=config.missing_ids,
        owners_separator=config.owners_separator,
    )
    keys = {user: user_key(user, config.split_seed) for user in dict.fromkeys(examples["user"])}
    ordinals = np.arange(read, read + len(examples["user"]), dtype=np.int64)
    columns: dict[str, Any] = _halves(map(keys.__getitem__, examples["user"])) | {"ordinal": ordinals}
    columns |= _encoded(examples, encoder)
    if "label" in examples:
        columns["label"] = pa.array(examples["label"], pa.string())
    users = _halves(keys.values()) | _spellings(list(keys))
    _write(pa.table(users), folder / f"users-{number:06d}.parquet")
    found = {"bad_rows": bad.to_json(), "doubtful_rows": doubtful.to_json()}
    table = pa.table(columns).replace_schema_metadata({name: json.dumps(rows) for name, rows in found.items()})
    _write(table, folder / f"examples-{number:06d}.parquet")
    return found


def _encoded(examples: dict[str, list[Any]], encoder: TextEncoder) -> dict[str, Any]:
    """The examples' "tokens", and which of them count in the loss: "prefix", "scored", or neither for all."""
    if "messages" in examples:  # A chat template writes the special tokens itself.
        tokens, lengths, scored = encoder.encode_conversations(examples["messages"])
        return {"tokens": _binary(tokens, lengths), "scored": _binary(scored, lengths)}
    framed = encoder.frame is not None
    if "prompt" not in examples:
        encode = encoder.encode_framed if framed else encoder.encode
        return {"tokens": _binary(*encode(examples["text"]))}
    if framed:
        prompts, prefix = encoder.encode_framed(examples["prompt"])
        tokens, lengths = encoder.encode_framed(examples["text"], target=encoder.framed == "apart")
    else:
        prompts, prefix = encoder.encode(examples["prompt"], end=False)
        tokens, lengths = encoder.encode(examples["text"], begin=False)
    return {"tokens": _binary(*_interleaved(prompts, prefix, tokens, lengths)), "prefix": prefix.astype(np.int32)}


def _spellings(users: list[str]) -> dict[str, Any]:
    """Users, and the forms under which several may be one person; a form is null where it is the id itself."""
    columns = {"user": pa.array(users, pa.string())}
    for name, form in (("normal", normal_form), ("loose", loose_form)):
        columns[name] = pa.array([None if form(user) == user else form(user) for user in users], pa.string())
    return columns


def _halves(keys: Iterable[bytes]) -> dict[str, np.ndarray]:
    """16-byte keys as two columns of integers, which sort as the bytes do."""
    halves = np.frombuffer(b"".join(keys), dtype=">u8").reshape(-1, 2)
    return {"high": halves[:, 0].astype(np.uint64), "low": halves[:, 1].astype(np.uint64)}


def _write(table: pa.Table, file: Path) -> None:
    unfinished = file.with_suffix(".unfinished")
    pq.write_table(table, unfinished, compression="NONE", use_dictionary=False, write_statistics=False)
    os.replace(unfinished, file)


def _binary(tokens: np.ndarray, lengths: np.ndarray) -> pa.LargeBinaryArray:
    """Each example's tokens as bytes: an engine sorts them without looking inside."""
    ends = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths * tokens.itemsize, out=ends[1:])
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(tokens)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(lengths), buffers)


def _interleaved(
    first: np.ndarray, first_lengths: np.ndarray, second: np.ndarray, second_lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ragged rows joined row by row."""
    lengths = first_lengths + second_lengths
    from_first = np.repeat(np.tile([True, False], len(lengths)), np.stack([first_lengths, second_lengths], 1).ravel())
    joined = np.empty(len(from_first), dtype=first.dtype)
    joined[from_first] = first
    joined[~from_first] = second
    return joined, lengths
