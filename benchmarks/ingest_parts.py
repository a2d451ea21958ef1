"""The parts that the first pass of `prepare` leaves, made up directly: for measuring the other passes alone."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.synthetic_users import user_sizes
from fedsim.data.part import PARTS, user_key, write_parquet
from fedsim.data.spool import PART_RECORDS

SHORTEST, LONGEST = 20, 60
"""Tokens of a text."""
TOKEN_TYPE = np.dtype(np.uint16)


def write_parts(folder: Path, num_users: int, num_rows: int, vocabulary: int, seed: int = 0) -> int:
    """Write so many shuffled examples of random tokens as parts; returns their bytes."""
    folder.mkdir(parents=True)
    keys = _keys(num_users)
    generator = np.random.default_rng(seed)
    owners = np.repeat(np.arange(num_users, dtype=np.int32), user_sizes(num_users, num_rows, seed))
    generator.shuffle(owners)
    size = 0
    for number, start in enumerate(range(0, num_rows, PART_RECORDS)):
        users = owners[start : start + PART_RECORDS]
        lengths = generator.integers(SHORTEST, LONGEST, len(users))
        ends = np.zeros(len(users) + 1, dtype=np.int64)
        np.cumsum(lengths * TOKEN_TYPE.itemsize, out=ends[1:])
        tokens = generator.integers(0, vocabulary, int(lengths.sum()), dtype=TOKEN_TYPE)
        buffers = [None, pa.py_buffer(ends), pa.py_buffer(tokens)]
        columns = {
            "high": keys[users, 0],
            "low": keys[users, 1],
            "ordinal": np.arange(start, start + len(users), dtype=np.int64),
            "user": pa.array(users).cast(pa.string()),
            "tokens": pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(users), buffers),
        }
        file = folder / PARTS.replace("*", f"{number:06d}")
        write_parquet(pa.table(columns), file)
        size += file.stat().st_size
    return size


def _keys(num_users: int) -> np.ndarray:
    """uint64 [users, 2]: keyed hashes of users called "0", "1", …"""
    found = b"".join(user_key(str(user), 0) for user in range(num_users))
    return np.frombuffer(found, dtype=">u8").reshape(-1, 2).astype(np.uint64)
