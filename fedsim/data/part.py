"""A part of the data: its records checked, their texts encoded, and the examples set down as a Parquet file."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedsim.data.check import good_records
from fedsim.data.config import DataConfig
from fedsim.data.encode import TextEncoder
from fedsim.data.owners import Joiner, keeps_several, owners_in
from fedsim.data.records import Records, Tally

PARTS = "examples-*.parquet"
FOUND = ("bad_rows", "doubtful_rows")
"""What a part says of its records, in its metadata."""


@dataclass(frozen=True, kw_only=True)
class PartWriter:
    """Makes parts, one as well as another in this process and in others.

    Attributes:
        folder: Where the parts go.
        columns: The column of each role ("user", "text", …) in the records.
        config: Resolved configuration.
        encoder: The tokenizer.
    """

    folder: Path
    columns: dict[str, str]
    config: DataConfig
    encoder: TextEncoder

    def found(self, number: int) -> dict[str, Any] | None:
        """What a finished part says of its records; None where there is none yet."""
        file = self.file(number)
        if not file.is_file():
            return None
        metadata = pq.read_metadata(file).metadata
        return {name: json.loads(metadata[name.encode()]) for name in FOUND}

    def write(self, number: int, first: int, part: list[Records]) -> dict[str, Any]:
        """Make one part.

        Args:
            number: Which.
            first: How many records there are before it.
            part: Its records.

        Returns:
            Records left out ("bad_rows") and records that may be several ("doubtful_rows"), as `Tally.to_json`.
        """
        bad, doubtful = Tally(), Tally()
        key = partial(user_key, split_seed=self.config.split_seed)
        examples = good_records(
            part,
            self.columns,
            self.encoder.render,
            bad,
            doubtful=doubtful,
            normalised=self.config.user_ids == "normalised",
            missing_ids=self.config.missing_ids,
            owners_separator=self.config.owners_separator,
            join=Joiner(key, self.config) if keeps_several(self.config) else None,
        )
        users = examples["user"]
        keys = {user: key(user) for user in dict.fromkeys(users)}
        columns: dict[str, Any] = _halves(map(keys.__getitem__, users))
        columns["ordinal"] = np.arange(first, first + len(users), dtype=np.int64)
        columns["user"] = pa.array(users, pa.string())
        columns |= self._encoded(examples)
        if "label" in examples:
            columns["label"] = pa.array(examples["label"], pa.string())
        found = {"bad_rows": bad.to_json(), "doubtful_rows": doubtful.to_json()}
        metadata = {name: json.dumps(rows) for name, rows in found.items()}
        write_parquet(pa.table(columns).replace_schema_metadata(metadata), self.file(number))
        return found

    def file(self, number: int) -> Path:
        """Where a part is, or will be."""
        return self.folder / PARTS.replace("*", f"{number:06d}")

    def _encoded(self, examples: dict[str, list[Any]]) -> dict[str, Any]:
        """The examples' "tokens", and which of them count in the loss: "prefix", "scored", or neither for all."""
        encoder = self.encoder
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


def user_key(user: str, split_seed: int) -> bytes:
    """The keyed hash that orders users and so assigns them to splits: 16 bytes, big-endian.

    That of several owners begins as one owner's does: they are in the same split, and so is what is theirs.
    """
    if len(owners := owners_in(user)) > 1:
        return user_key(owners[0], split_seed)[:8] + _hash(user, split_seed)[8:]
    return _hash(user, split_seed)


def _hash(user: str, split_seed: int) -> bytes:
    return hashlib.blake2b(user.encode(), key=_split_key(split_seed), digest_size=16).digest()


@cache
def _split_key(split_seed: int) -> bytes:
    return hashlib.blake2b(f"fedsim split {split_seed}".encode(), digest_size=32).digest()


def write_parquet(table: pa.Table, file: Path) -> None:
    """Write a file that is whole or not there, whoever else may be writing the same one."""
    unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
    pq.write_table(table, unfinished, compression="NONE", use_dictionary=False, write_statistics=False)
    os.replace(unfinished, file)


def _halves(keys: Iterable[bytes]) -> dict[str, np.ndarray]:
    """16-byte keys as two columns of integers, which sort as the bytes do."""
    halves = np.frombuffer(b"".join(keys), dtype=">u8").reshape(-1, 2)
    return {"high": halves[:, 0].astype(np.uint64), "low": halves[:, 1].astype(np.uint64)}


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
