"""Many users of known diversity: each writes windows of words from books, its own passage or anybody's.

An example is a window of words. With probability `diversity` it begins anywhere in all books, and else within the
passage that is its user's own. At 0 a user repeats itself; at 1 its examples are as different as those of two users.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BOOKS = "public_pretrain/books.parquet"
"""Paragraphs of public-domain books in their order, columns user_id (the author), book and text, in the folder of
corpora."""
WINDOW, PASSAGE = 40, 400
"""Words of an example, and of a user's own passage."""


@dataclass(frozen=True, kw_only=True)
class SyntheticUsers:
    """A population.

    Attributes:
        diversity: Probability that an example is anybody's.
        users: How many there are.
        examples: Of each.
        seed: Who writes what.
    """

    diversity: float
    users: int = 20_000
    examples: int = 16
    seed: int = 0

    @property
    def file(self) -> str:
        """Its file's name, from which nothing of it is left out."""
        return f"synthetic-{self.users}x{self.examples}-diversity{self.diversity:g}-seed{self.seed}.parquet"

    def starts(self, words: int) -> np.ndarray:
        """At which word each example begins, int64 [users, examples].

        Args:
            words: Of all books, one after the other.
        """
        generator = np.random.default_rng(self.seed)
        homes = generator.integers(words - PASSAGE, size=(self.users, 1))
        own = homes + generator.integers(PASSAGE - WINDOW, size=(self.users, self.examples))
        anywhere = generator.integers(words - WINDOW, size=own.shape)
        return np.where(generator.random(own.shape) < self.diversity, anywhere, own)

    def write(self, corpora: Path, folder: Path) -> Path:
        """Write the users (user_id, text) into a folder unless they are there; returns the file.

        Args:
            corpora: The folder that has BOOKS.
            folder: Where the file goes.
        """
        path = folder / self.file
        if path.exists():
            return path
        words = " ".join(pq.read_table(corpora / BOOKS, columns=["text"])["text"].to_pylist()).split()
        starts = self.starts(len(words)).ravel()
        table = pa.table(
            {
                "user_id": np.repeat(np.arange(self.users), self.examples),
                "text": [" ".join(words[start : start + WINDOW]) for start in starts],
            }
        )
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        pq.write_table(table, partial, compression="zstd")
        partial.rename(path)
        return path
