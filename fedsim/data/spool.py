"""First pass over the data: check every record, encode its text, and set the examples down in parts.

A finished part is never made again: an interrupted ingest reads the source from the beginning (cheap) but encodes
(dear) only what is missing.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedsim.data.config import DataConfig
from fedsim.data.encode import TextEncoder
from fedsim.data.records import MALFORMED, BadRows, Records, in_parts
from fedsim.data.sources import Progress, Source
from fedsim.errors import InvalidInput

PART_RECORDS = 1 << 16
PART_CHARACTERS = 1 << 25


def spool(
    source: Source, config: DataConfig, encoder: TextEncoder, folder: Path, progress: Progress
) -> tuple[int, BadRows]:
    """Write the source's examples as Parquet parts, going on where an earlier call stopped.

    Args:
        source: What to read.
        config: Resolved configuration.
        encoder: The tokenizer.
        folder: Where the parts go: `examples-*.parquet` and `users-*.parquet`, the latter in place first.
        progress: Told how far the source has been read.

    Returns:
        (records read, those left out).

    Raises:
        InvalidInput: For a bad row when config.bad_rows is "refuse".
    """
    folder.mkdir(parents=True, exist_ok=True)
    bad = BadRows()
    read = 0
    for number, part in enumerate(in_parts(source.read(), PART_RECORDS, PART_CHARACTERS)):
        file = folder / f"examples-{number:06d}.parquet"
        if file.is_file():
            found = json.loads(pq.read_metadata(file).metadata[b"bad_rows"])
        else:
            found = _write_part(part, read, source, config, encoder, folder, number)
        bad.merge(found)
        read += sum(map(len, part))
        progress("Reading and encoding", part[-1].done, source.total)
    progress("Reading and encoding", source.total or read, source.total or read)
    return read, bad


def user_key(user: str, split_seed: int) -> bytes:
    """The keyed hash that orders users and so assigns them to splits: 16 bytes, big-endian."""
    key = hashlib.blake2b(f"fedsim split {split_seed}".encode(), digest_size=32).digest()
    return hashlib.blake2b(user.encode(), key=key, digest_size=16).digest()


def _write_part(
    part: list[Records], read: int, source: Source, config: DataConfig, encoder: TextEncoder, folder: Path, number: int
) -> dict[str, Any]:
    bad = BadRows()
    examples = list(_checked(part, source.columns, encoder, bad))
    if bad.total and config.bad_rows == "refuse":
        reason, entry = next(iter(bad.to_json().items()))
        hint = "Mend the data, or use --data.bad-rows skip to leave such rows out."
        raise InvalidInput("data", entry["first"][0], f"a good row ({reason})", hint)
    keys = {example["user"]: b"" for example in examples}
    keys = {user: user_key(user, config.split_seed) for user in keys}
    halves = np.frombuffer(b"".join(keys[example["user"]] for example in examples), dtype=">u8").reshape(-1, 2)
    columns: dict[str, Any] = {
        "high": halves[:, 0].astype(np.uint64),
        "low": halves[:, 1].astype(np.uint64),
        "ordinal": np.arange(read, read + len(examples), dtype=np.int64),
    }
    texts = [example["text"] for example in examples]
    if "prompt" in source.columns or "messages" in source.columns:
        prompts, prefix = encoder.encode([example["prompt"] for example in examples], end=False)
        tokens, lengths = encoder.encode(texts, begin=False)
        tokens, lengths = _interleaved(prompts, prefix, tokens, lengths)
        columns["prefix"] = prefix.astype(np.int32)
    else:
        tokens, lengths = encoder.encode(texts)
    columns["tokens"] = _binary(tokens, lengths)
    if "label" in source.columns:
        columns["label"] = pa.array([example["label"] for example in examples], pa.string())
    halves = np.frombuffer(b"".join(keys.values()), dtype=">u8").reshape(-1, 2)
    users = {"high": halves[:, 0].astype(np.uint64), "low": halves[:, 1].astype(np.uint64)}
    names = pa.array([name.encode() for name in keys], pa.binary()).cast(pa.string())
    _write(pa.table(users | {"user": names}), folder / f"users-{number:06d}.parquet")
    found = bad.to_json()
    table = pa.table(columns).replace_schema_metadata({"bad_rows": json.dumps(found)})
    _write(table, folder / f"examples-{number:06d}.parquet")
    return found


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


def _checked(
    part: list[Records], columns: dict[str, str], encoder: TextEncoder, bad: BadRows
) -> Iterator[dict[str, str]]:
    """The good records, by role, all values as strings; the others are counted."""
    for records in part:
        values = [records.columns[column] for column in columns.values()]
        for place, row in enumerate(zip(*values, strict=True)):
            try:
                yield _check(dict(zip(columns, row, strict=True)), encoder)
            except _Bad as reason:
                bad.add(str(reason), f"{records.origin}:{records.first + place}")


class _Bad(Exception):
    """Why a record is left out."""


def _check(record: dict[str, Any], encoder: TextEncoder) -> dict[str, str]:
    if any(value is MALFORMED for value in record.values()):
        raise _Bad("cannot be parsed")
    owners = record.pop("owners", None)
    if owners is not None and len(set(owners if isinstance(owners, list) else [owners])) > 1:
        raise _Bad("several owners")
    good = {"user": _name(record.pop("user"), "user")}
    if "label" in record:
        good["label"] = _name(record.pop("label"), "label")
    if "messages" in record:
        good["prompt"], good["text"] = encoder.render(_messages(record.pop("messages")))
    for role, value in record.items():
        if value is None and role == "prompt":
            value = ""
        if value is None:
            raise _Bad(f"missing {role}")
        if not isinstance(value, str):
            raise _Bad(f"{role} of the wrong type ({type(value).__name__})")
        good[role] = value
    if not good["text"].strip():
        raise _Bad("empty text")
    for value in good.values():
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise _Bad("invalid UTF-8") from None
    return good


def _name(value: Any, role: str) -> str:
    """A user or label as a string; whole numbers are written alike whether stored as integer or float."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise _Bad(f"missing {role}")
    if isinstance(value, str):
        if not value or value.isspace():
            raise _Bad(f"missing {role}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Bad(f"{role} of the wrong type ({type(value).__name__})")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _messages(value: Any) -> list[dict[str, str]]:
    if value is None or value == []:
        raise _Bad("missing messages")
    fits = isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
        for item in value
    )
    if not fits:
        raise _Bad("messages of the wrong type")
    return value
