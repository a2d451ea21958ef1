"""Text by user in the shape of StackOverflow: few users with very many examples, many with few."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SHARD_EXAMPLES = 500_000
LOG_SPREAD = 1.6
"""Standard deviation of the logarithm of a user's number of examples. The federated StackOverflow data set has 342,477
users and 135.8 million examples, half of the users below 150 and the largest above 100,000: a log-normal with about
this spread."""


def user_sizes(num_users: int, num_examples: int, seed: int) -> np.ndarray:
    """Examples of each user, at least 1 each, num_examples in all, int64 [num_users]."""
    weights = np.random.default_rng(seed).lognormal(sigma=LOG_SPREAD, size=num_users)
    sizes = 1 + np.floor(weights * ((num_examples - num_users) / weights.sum())).astype(np.int64)
    sizes[: num_examples - sizes.sum()] += 1
    return sizes


def write_shards(folder: Path, num_users: int, num_examples: int, phrases: list[str], seed: int = 0) -> int:
    """Write shuffled examples as Parquet shards (user_id, text); two phrases make a text. Returns bytes of text."""
    sizes = user_sizes(num_users, num_examples, seed)
    generator = np.random.default_rng(seed + 1)
    users = np.repeat(np.arange(num_users, dtype=np.int32), sizes)
    generator.shuffle(users)
    pool = pa.array(phrases)
    total = 0
    for number, start in enumerate(range(0, num_examples, SHARD_EXAMPLES)):
        owners = users[start : start + SHARD_EXAMPLES]
        halves = [pool.take(pa.array(generator.integers(0, len(phrases), len(owners)))) for _ in range(2)]
        text = pc.binary_join_element_wise(*halves, " ")
        total += pc.sum(pc.binary_length(text)).as_py()
        table = pa.table({"user_id": pa.array(owners), "text": text})
        pq.write_table(table, folder / f"examples-{number:04d}.parquet", compression="zstd")
    return total
